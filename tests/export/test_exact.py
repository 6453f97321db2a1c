"""Files in the form `exact`, whose outputs are bit-equal to those of bqnn."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from bqnn.export.model import export
from bqnn.export.verification import predict_executed
from bqnn.inference.predict import predictive
from bqnn.layers.dropout import to_mcdropout
from bqnn.quant.integer import convert
from tests.export.networks import NUM_SAMPLES, differing, quantized, rows_for, run
from tests.quant.conftest import SHAPES, converted, float_net
from tests.quant.test_torchvision import SMALL, made, small_resnet

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("bits", [(8, 7), (4, 7), (2, 7)])
@pytest.mark.parametrize("net", SHAPES)
@pytest.mark.parametrize("method", NUM_SAMPLES)
def test_all_methods_and_networks(method: str, net: str, bits: tuple[int, int]) -> None:
    weight_bits, activation_bits = bits
    options = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    model = quantized(float_net(method, net), SHAPES[net], **options)
    exported = export(model, NUM_SAMPLES[method])
    assert not exported.float_parts
    assert differing(exported, model) == differing(exported, model, optimized=False) == 0
    model.net = convert(deepcopy(model.net))
    assert differing(exported, model) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"weight_granularity": "tensor"},
        {"weight_symmetric": False},
        {"weight_symmetric": False, "weight_granularity": "tensor"},
        {"engine": "x86"},
        {"engine": "onednn"},
        {"engine": "onednn", "weight_granularity": "tensor"},
        {"activation_bits": 3},
        {"weight_bits": 8, "activation_bits": 8},
        {"engine": "onnxruntime"},
        {"engine": "reference", "activation_bits": 8},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
@pytest.mark.parametrize(("method", "net"), [("bbb", "mlp"), ("mcdropout", "resnet")])
def test_all_grids_and_engines(method: str, net: str, options: dict[str, Any]) -> None:
    model = quantized(float_net(method, net), SHAPES[net], **options)
    exported = export(model, 2)
    assert differing(exported, model) == differing(exported, model, optimized=False) == 0


def test_products_that_could_saturate_are_of_unsigned_integers() -> None:
    net = float_net("pointwise", "lenet")
    kinds = {}
    for bits in (7, 8):
        model = quantized(deepcopy(net), SHAPES["lenet"], activation_bits=bits)
        exported = export(model, 1)
        constants = {c.name: c.data_type for c in exported.proto.graph.initializer}
        calls = [n for n in exported.proto.graph.node if n.op_type.endswith("Integer")]
        kinds[bits] = {constants[call.input[1]] for call in calls}
    int8, uint8 = 3, 2
    assert kinds[7] == {int8}
    assert uint8 in kinds[8]


class Plain(nn.Module):
    """A network of plain torch with everything that moves, sums, pools or concatenates."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 6, 3, padding=2, dilation=2, groups=2)
        self.after = nn.Conv2d(10, 10, 3, stride=2)
        self.pool = pool
        self.drop = nn.Dropout(0.5)
        self.last = nn.LazyLinear(10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.cat([self.left(x), torch.relu(self.right(x))], 1)
        x = x + nn.functional.max_pool2d(x, 3, stride=1, padding=1)
        x = x.view(x.size(0), 2, 5, 8, 8).transpose(1, 2).reshape(x.shape)  # a channel shuffle
        x = self.pool(nn.functional.relu6(self.after(x)))
        first, second = x.chunk(2, 1)
        x = torch.cat([second.permute(0, 1, 3, 2).flatten(1), first.flatten(1)], 1)
        return nn.functional.log_softmax(self.last(self.drop(x)), dim=1)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(2, padding=1), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(2)],
    ids=["windows", "global", "adaptive"],
)
def test_a_network_of_plain_torch(pool: nn.Module, drops: bool) -> None:
    torch.manual_seed(0)
    net = Plain(pool)
    net(torch.zeros(1, 3, 8, 8))
    model = quantized((to_mcdropout(net) if drops else net).eval(), (3, 8, 8))
    exported = export(model, 2 if drops else 1)
    assert exported.float_parts == ["log_softmax"]
    rows = rows_for(model)
    expected = predict_executed(model, rows, len(exported.steps)).numpy()
    found = run(exported, rows)["samples"]
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("make", SMALL, ids=lambda make: make.__name__)
def test_networks_of_torchvision(make: Callable[..., nn.Module]) -> None:
    model = quantized(made(make), (3, 32, 32))
    exported, rows = export(model, 1), rows_for(model, 16)
    expected = predict_executed(model, rows, 1).numpy()
    found = run(exported, rows)["samples"]
    if exported.float_parts:
        np.testing.assert_allclose(found, expected, atol=1e-6)
    else:
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (models.resnet18, "pointwise"),
        (models.mobilenet_v2, "mcdropout"),
        (small_resnet, "bbb"),
        (small_resnet, "sghmc"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_int8_networks_of_torchvision(make: Callable[..., nn.Module], method: str) -> None:
    model = quantized(converted(made(make), method), (3, 32, 32))
    exported = export(model, min(2, NUM_SAMPLES[method]))
    assert not exported.float_parts
    model.net = convert(deepcopy(model.net))
    assert differing(exported, model, count=20) == 0


def test_draws_and_masks_are_those_of_a_row_that_is_predicted_alone() -> None:
    for method in ("bbb", "mcdropout"):
        model = quantized(float_net(method, "lenet"), SHAPES["lenet"])
        exported, rows = export(model, 4), rows_for(model, 2)
        inputs = (rows[1:].float() / 255 - 0.4) / 0.3
        alone = predictive(model.net, inputs, 4, seed=model.seed)
        assert np.array_equal(run(exported, rows)["samples"][:, 1:], alone.numpy())


def test_what_draws_have_in_common_stands_once() -> None:
    model = quantized(float_net("mcdropout", "lenet"), SHAPES["lenet"])
    one, many = export(model, 1).proto.graph, export(model, 10).proto.graph
    size = {
        name: sum(len(c.raw_data) for c in graph.initializer)
        for name, graph in (("one", one), ("many", many))
    }
    assert size["many"] < 1.2 * size["one"]  # only masks are added
    convolutions = [n for n in many.node if n.op_type == "ConvInteger"]
    assert 2 <= len(convolutions) <= 1 + 10  # the first is before all masks; masks can be equal


def test_the_outputs_are_those_of_the_mixture() -> None:
    model = quantized(float_net("bbb", "mlp"), SHAPES["mlp"])
    found = run(export(model, 5), rows_for(model))
    expected = model.likelihood.summary(torch.from_numpy(found.pop("samples")))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name].numpy(), atol=1e-6)


def test_the_number_of_rows_is_free() -> None:
    model = quantized(float_net("bbb", "resnet"), SHAPES["resnet"])
    exported, rows = export(model, 2), rows_for(model, 7)
    whole = run(exported, rows)["samples"]
    assert np.array_equal(run(exported, rows[3:4])["samples"], whole[:, 3:4])


class Unsupported(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(1)


def test_what_cannot_be_exported_is_named() -> None:
    net = Unsupported(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10))
    with pytest.raises(TypeError, match="the function cumsum cannot be exported"):
        export(quantized(net.eval(), (6,)), 1)
    tail = nn.Sequential(nn.Flatten(), nn.Linear(6, 10), nn.Tanh())
    with pytest.raises(TypeError, match="2, a Tanh, cannot be exported"):
        export(quantized(tail.eval(), (6,)), 1)


def test_a_checkpoint_without_normalization_is_refused() -> None:
    model = quantized(float_net("pointwise", "mlp"), SHAPES["mlp"])
    del model.recipe["facts"]["input_mean"]
    with pytest.raises(ValueError, match="does not store how its inputs are normalized"):
        export(model, 1)


@pytest.mark.parametrize("net", SHAPES)
def test_openvino_runs_the_same_file(net: str) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    model = quantized(float_net("bbb", net), SHAPES[net])
    core, rows = openvino.Core(), rows_for(model)
    for form, share in (("exact", 0), ("qdq", 0.1)):
        exported = export(model, 2, form)
        content = exported.proto.SerializeToString()
        precise = {"INFERENCE_PRECISION_HINT": "f32"}  # the default of some CPUs is bfloat16
        compiled = core.compile_model(core.read_model(content), "CPU", precise)
        found = compiled({"inputs": rows.numpy().astype(exported.inputs.dtype)})["samples"]
        expected = run(exported, rows)["samples"]
        steps = abs(found - expected) / exported.steps[:, None].numpy()
        assert (steps > 0.01).mean() <= share  # its floats differ in the last digit
