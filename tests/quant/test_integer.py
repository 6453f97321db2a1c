"""int8 layers compute exactly the integers of the simulation."""

import copy
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bqnn.arguments import ArgumentError
from bqnn.inference.predict import predictive
from bqnn.layers.bayes import to_bayes
from bqnn.layers.draws import held_draw
from bqnn.layers.dropout import MCDropout, to_mcdropout
from bqnn.layers.markers import Enter, Leave
from bqnn.quant.engines import engine as engine_named
from bqnn.quant.engines import fbgemm, measure, usable_engine
from bqnn.quant.engines.contract import ActivationGrid, LayerEngine
from bqnn.quant.engines.reference import ExactLayer
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import IntegerDropout, convert
from bqnn.quant.quantize import prepare_qat, quantize
from bqnn.quant.simulated import SimulatedLayer, calibrate, prepare
from bqnn.quant.spec import ENGINES, QuantSpec
from bqnn.quant.summary import comparison_noise, twins, weight_integers
from tests.quant.conftest import Make, float_net, inputs

METHODS = ("pointwise", "bbb", "mcdropout", "sghmc")
NETS = ("mlp", "lenet", "resnet")
TWINS = ("fbgemm", "x86", "onednn", "reference")


@torch.no_grad()
def in_float64(layer: SimulatedLayer, x: Tensor) -> Tensor:
    """Compute the outputs before rounding from the rounded weights, in float64."""
    factor, bias = layer.fold()
    weight = layer.rounded_weight(factor).double()
    out = layer.linear_map(x.double(), weight, None if bias is None else bias.double())
    return out.relu() if layer.relu else out


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_the_simulation_rounds_what_float64_gives(method: str, net: str, simulated: Make) -> None:
    """For any engine, it differs only at rounding ties, by one step."""
    num_layers = wrong_outputs = outputs = 0
    for engine in TWINS:
        made = simulated(method, net, weight_bits=8, engine=engine)
        integer = convert(copy.deepcopy(made), engine)
        for twin in twins(made, integer, inputs(net, rows=512)):
            if not isinstance(twin.module, SimulatedLayer):
                continue
            quant = twin.module.output_quant
            with held_draw(made, 0, comparison_noise()):
                exact = in_float64(twin.module, twin.inputs[0])
            steps = exact / quant.scale.double() + quant.zero_point
            from_tie = (steps - steps.floor() - 0.5).abs()
            correct = steps.round().clamp(quant.quant_min, quant.quant_max)
            wrong = twin.expected != correct
            assert not (wrong & (from_tie > 1e-3)).any(), twin.name
            assert ((twin.expected - correct).abs() <= 1).all(), twin.name
            wrong_outputs += int(wrong.sum())
            outputs += wrong.numel()
            num_layers += 1
    assert num_layers >= 3 * len(TWINS)
    assert wrong_outputs < outputs / 10_000


@pytest.mark.parametrize("method", METHODS)
def test_gradients_see_the_same_network(method: str, simulated: Make) -> None:
    """With gradients, the simulation computes in floats: at most one step away, at ties."""
    made = simulated(method, "mlp")
    x = inputs("mlp", rows=512)
    with held_draw(made, 0):
        with torch.no_grad():
            expected = made(x)
        got = made(x)
    if method != "mcdropout":  # whose masks are drawn in each pass
        assert (got - expected).abs().max() < 0.02 * expected.abs().max()
    assert got.requires_grad == (method != "sghmc")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("method", ["pointwise", "bbb"])
def test_integers_stay_inside_their_bits(method: str, bits: int, simulated: Make) -> None:
    made = simulated(method, "resnet", weight_bits=bits, activation_bits=bits)
    for layer in made.modules():
        if isinstance(layer, SimulatedLayer):
            for weights in weight_integers(layer):
                low = 0 if weights.name == "sigma" else -(2 ** (bits - 1))
                assert low <= int(weights.values.min())
                assert int(weights.values.max()) <= low + 2**bits - 1
    integer = convert(made, "fbgemm")
    seen: list[int] = []
    for module in integer.modules():
        if hasattr(module, "grid"):
            module.register_forward_hook(
                lambda module, _, out: seen.append(int(module.engine.integers(out).max()))
            )
    integer(3 * inputs("resnet"))  # beyond what was calibrated
    assert len(seen) > 10
    assert max(seen) <= 2**bits - 1
    assert max(seen) == 2**bits - 1  # the cut was needed


def test_draws_differ_and_equal_seeds_give_equal_draws(simulated: Make) -> None:
    for method in ("bbb", "mcdropout", "sghmc"):
        integer = convert(simulated(method, "lenet"), "fbgemm")
        x = inputs("lenet")
        samples = predictive(integer, x, 2, seed=1)
        assert not torch.equal(samples[0], samples[1])
        assert torch.equal(samples, predictive(integer, x, 2, seed=1))
        if method != "sghmc":
            assert not torch.equal(samples, predictive(integer, x, 2, seed=2))


@pytest.mark.parametrize("method", ["bbb", "mcdropout", "sghmc"])
def test_noise_is_the_same_in_float_and_int8(method: str, simulated: Make) -> None:
    x = inputs("mlp")
    in_float = predictive(float_net(method, "mlp"), x, 2)
    integer = predictive(convert(simulated(method, "mlp"), "fbgemm"), x, 2)
    same = (in_float - integer).abs().mean()
    swapped = (in_float - integer.flip(0)).abs().mean()
    assert same < 0.5 * swapped


def test_dropout_in_integers_is_exact() -> None:
    floats = torch.randn(64, 50)
    for name in ("fbgemm", "onednn", "reference"):
        engine = usable_engine(name)
        assert isinstance(engine, LayerEngine)
        x = engine.quantize(floats, ActivationGrid(0.05, 60, 255))
        dropout = MCDropout(0.25)
        torch.manual_seed(1)
        got = IntegerDropout(dropout, engine)(x)
        torch.manual_seed(1)
        expected = dropout(engine.dequantize(x))
        dropped = expected == 0
        integers = engine.integers(got)
        assert torch.equal(integers[~dropped], engine.integers(x)[~dropped])
        assert (integers[dropped] == 60).all()
        scale, zero_point = engine.grid(got)
        assert scale == pytest.approx(0.05 / 0.75)
        assert zero_point == 60
        assert torch.allclose(engine.dequantize(got), expected)


def test_one_draw_serves_many_batches(simulated: Make) -> None:
    integer = convert(simulated("bbb", "mlp"), "fbgemm")
    x = inputs("mlp")
    with held_draw(integer, 0):
        assert torch.equal(integer(x)[:8], integer(x[:8]))
    assert not torch.equal(integer(x), integer(x))


def test_convert_refuses_what_it_cannot_do(simulated: Make) -> None:
    with pytest.raises(ValueError, match="call prepare"):
        convert(float_net("pointwise", "mlp"), "fbgemm")
    with pytest.raises(ValueError, match="has seen no data"):
        convert(prepare(fuse(float_net("pointwise", "mlp")), QuantSpec()), "fbgemm")


def small_conv(groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(16, 16, 3, padding=1, groups=groups)
    return nn.Sequential(Enter(), layer, nn.ReLU(), nn.Flatten(), nn.Linear(576, 3), Leave())


def calibrated(net: nn.Module, x: Tensor, **options: object) -> nn.Module:
    spec = QuantSpec(activation_observer="minmax", **options)
    return calibrate(prepare(fuse(net), spec), [x])


IMAGES = torch.randn(8, 16, 6, 6, generator=torch.Generator().manual_seed(0))


def test_sums_that_would_saturate_are_exact_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measure, "has_vnni", lambda: False)
    for engine in ("fbgemm", "x86", "onednn"):
        caplog.clear()
        made = calibrated(small_conv(), IMAGES, activation_bits=8, engine=engine)
        assert re.search(
            r"2 layers \(the first is 1\) run on the engine reference.* activation_bits=7 avoids",
            caplog.text,
        )
        assert [made[place].executor.name for place in (1, 4)] == ["reference"] * 2
        integer = convert(copy.deepcopy(made), probe=IMAGES)
        assert isinstance(integer[1].packed, ExactLayer)
        assert torch.equal(integer(IMAGES), made(IMAGES))
    caplog.clear()
    for bits in ({"activation_bits": 7}, {"activation_bits": 8, "weight_bits": 7}):
        made = calibrated(small_conv(), IMAGES, **bits)
        assert made[1].executor.name == "fbgemm"
    if engine_named("onnxruntime").missing() is None:
        calibrated(small_conv(), IMAGES, activation_bits=8, engine="onnxruntime")
    assert not caplog.text


def test_images_without_a_batch_dimension_are_refused_in_one_line() -> None:
    made = calibrated(small_conv(), IMAGES)
    for net in (made, *(convert(copy.deepcopy(made), engine) for engine in ENGINES)):
        with pytest.raises(ValueError, match=r"takes \[B, 16, H, W\]; add the batch dimension"):
            net(IMAGES[0])


def test_a_probe_refuses_other_integers_and_warns_of_ties(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = calibrated(small_conv(), IMAGES)
    convert(copy.deepcopy(made), "fbgemm", probe=IMAGES)
    assert not caplog.text
    run = fbgemm.PackedWeight.__call__

    def off(steps: int) -> object:
        def other(self: object, x: Tensor, relu: bool, output: ActivationGrid) -> Tensor:
            out = run(self, x, relu, output)
            integers = (out.int_repr().int() + steps).clamp(0, 255).to(torch.uint8)
            return fbgemm.make("fbgemm").wrap(integers, output.scale, output.zero_point)

        return other

    monkeypatch.setattr(fbgemm.PackedWeight, "__call__", off(1))
    convert(copy.deepcopy(made), "fbgemm", probe=IMAGES)
    assert "by up to 1 steps" in caplog.text
    monkeypatch.setattr(fbgemm.PackedWeight, "__call__", off(9))
    with pytest.raises(ValueError, match=r"by up to 9 steps; evaluate it with numeric=simulated"):
        convert(copy.deepcopy(made), "fbgemm", probe=IMAGES)


def test_another_engine_than_the_simulated_one_is_said(caplog: pytest.LogCaptureFixture) -> None:
    convert(calibrated(small_conv(), IMAGES), "x86")
    assert "the simulation rounds like fbgemm" in caplog.text


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    integer = quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), [x])
    x[2, 1, 3, 3] = bad
    with pytest.raises(ValueError, match=r"^1 of the 4 rows of inputs contain NaN .* first row 2"):
        integer(x)


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)).eval()


@pytest.mark.parametrize("change", [to_mcdropout, to_bayes])
def test_quantized_networks_stay_what_they_are(change: Callable[[nn.Module], nn.Module]) -> None:
    x = torch.randn(8, 4)
    integers = [quantize(with_dropout(), [x], QuantSpec(engine=engine)) for engine in ENGINES]
    for net in (prepare_qat(with_dropout()), *integers):
        with pytest.raises(ArgumentError, match=f"quantized already; call {change.__name__} on"):
            change(net)


def test_the_mode_of_an_int8_network_does_not_matter() -> None:
    x = torch.randn(8, 4)
    integer = quantize(with_dropout(), [x])
    assert torch.equal(integer.train()(x), integer.eval()(x))
