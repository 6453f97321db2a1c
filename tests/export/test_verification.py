"""The comparison of a file with int8, and the card."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from bqnn.export.card import metrics_with_errors
from bqnn.export.measure import latencies, peak_bytes
from bqnn.export.model import Exported, export
from bqnn.export.verification import Verification, verify
from bqnn.inference.calibration import (
    Calibration,
    DeviationScaling,
    TemperatureScaling,
    VectorScaling,
)
from bqnn.inference.likelihoods import Classification, Likelihood, Regression
from bqnn.inference.predictions import Prediction
from bqnn.methods import Method
from bqnn.quant.integer import convert
from bqnn.quant.onnx.session import start_session
from tests.export.networks import quantized, rows_for
from tests.quant.conftest import SHAPES, float_net

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def verified(model: Method, exported: Exported) -> Verification:
    rows = rows_for(model)
    session = start_session(exported.proto.SerializeToString(), 1)
    return verify(session, exported, model, rows, torch.zeros(len(rows)).long())


def test_a_true_file_passes_and_a_changed_one_fails() -> None:
    model = quantized(float_net("bbb", "lenet"), SHAPES["lenet"])
    exported = export(model, 3)
    model.net = convert(deepcopy(model.net))
    found = verified(model, exported)
    found.require_equal()
    record = found.record()
    assert (record["rows"], record["num_samples"], record["differing"]) == (100, 3, 0)
    assert record["metrics"]["onnx/nll"] == record["metrics"]["int8/nll"]

    weight = next(
        c for c in exported.proto.graph.initializer if c.data_type == onnx.TensorProto.INT8
    )
    array = onnx.numpy_helper.to_array(weight).copy()
    array.flat[0] += 3
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    changed = verified(model, exported)
    assert changed.differing > 0
    with pytest.raises(ValueError, match=r"outputs differ from int8, by up to"):
        changed.require_equal()
    verified(model, replace(exported, form="qdq")).require_equal()  # there, they are counted


@pytest.mark.parametrize(
    ("calibration", "likelihood"),
    [
        (TemperatureScaling(0.4), Classification([str(digit) for digit in range(10)])),
        (
            VectorScaling(
                tuple(0.5 + 0.1 * i for i in range(10)), tuple(0.2 * i for i in range(10))
            ),
            Classification([str(digit) for digit in range(10)]),
        ),
        (DeviationScaling(3.0), Regression(5.0, 2.0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_calibrated_file_mixes_calibrated_draws(
    calibration: Calibration, likelihood: Likelihood
) -> None:
    model = quantized(float_net("bbb", "mlp", likelihood.num_outputs), SHAPES["mlp"])
    model.likelihood, model.calibration = likelihood, calibration
    exported = export(model, 3)
    model.net = convert(deepcopy(model.net))
    found = verified(model, exported)
    found.require_equal()
    metrics = found.record()["metrics"]
    assert metrics["onnx/nll"] == pytest.approx(metrics["int8/nll"], rel=1e-6)

    model.calibration = None
    raw = verified(model, exported)
    assert raw.differing == 0  # `samples` are not calibrated
    with pytest.raises(ValueError, match="what it computes from its draws differs"):
        raw.require_equal()


def test_errors_of_metrics_shrink_with_the_rows() -> None:
    torch.manual_seed(0)
    likelihood = Classification(["a", "b"])
    errors = []
    for count in (100, 10_000):
        targets = torch.randint(2, (count,))
        prediction = Prediction(likelihood, torch.randn(1, count, 2), targets)
        errors.append(metrics_with_errors(prediction)["error"]["standard_error"])
    assert errors[0] == pytest.approx(0.05, rel=0.4)  # sqrt(0.25 / 100)
    assert errors[1] == pytest.approx(0.005, rel=0.4)


def test_a_session_is_measured() -> None:
    model = quantized(float_net("pointwise", "mlp"), SHAPES["mlp"])
    session = start_session(export(model, 1).proto.SerializeToString(), 1)
    found = latencies(session, rows_for(model).numpy())
    assert [each["batch_size"] for each in found] == [1, 32, 256]
    assert all(each["milliseconds"] > 0 and each["calls"] >= 3 for each in found)
    peak = peak_bytes()
    assert peak is None or peak > 2**20
