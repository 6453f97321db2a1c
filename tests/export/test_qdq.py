"""Files in the form `qdq`, which tools for hardware read."""

import pytest

from bqnn.export.model import export
from bqnn.export.verification import predict_executed
from tests.export.networks import NUM_SAMPLES, quantized, rows_for, run
from tests.quant.conftest import SHAPES, float_net

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("net", SHAPES)
@pytest.mark.parametrize("method", NUM_SAMPLES)
def test_a_file_differs_by_few_steps(method: str, net: str) -> None:
    model = quantized(float_net(method, net), SHAPES[net], weight_bits=4)
    exported, rows = export(model, NUM_SAMPLES[method], "qdq"), rows_for(model)
    expected = predict_executed(model, rows, NUM_SAMPLES[method])
    found = run(exported, rows)["samples"]
    steps = abs(found - expected.numpy()) / exported.steps[:, None].numpy()
    assert steps.max() < 4.5
    assert (steps > 0.5).mean() < 0.2
    operators = {node.op_type for node in exported.proto.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    assert not operators & {"ConvInteger", "MatMulInteger"}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_affine_weights(granularity: str) -> None:
    options = {"weight_symmetric": False, "weight_granularity": granularity}
    model = quantized(float_net("pointwise", "lenet"), SHAPES["lenet"], **options)
    exported, rows = export(model, 1, "qdq"), rows_for(model)
    expected = predict_executed(model, rows, 1)
    found = run(exported, rows)["samples"]
    assert (abs(found - expected.numpy()) / exported.steps[:, None].numpy()).max() < 2.5
