"""Exactness: int8 layers compute the integers that the simulation promised."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bqnn.layers.draws import held_draw
from bqnn.layers.dropout import MCDropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.noise import reseed
from bqnn.predict import predictive
from bqnn.quant.fbgemm import has_vnni
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import IntegerDropout, convert
from bqnn.quant.simulated import SimulatedLayer, SimulatedPointLayer, prepare
from bqnn.quant.spec import QuantSpec
from bqnn.quant.summary import disagreements, twins, weight_integers
from tests.quant.conftest import Make, float_net, inputs

METHODS = ("pointwise", "bbb", "mcdropout", "sghmc")
NETS = ("mlp", "lenet", "resnet")
needs_vnni = pytest.mark.skipif(
    not has_vnni(), reason="without VNNI 8-bit sums of two products saturate in 16 bits"
)
# Every width of weights at 7-bit activations, every width of activations at 8-bit weights, and
# the corner where both are small.
WIDTHS = [(w, 7) for w in range(2, 9)] + [(8, a) for a in (2, 3, 4, 5, 6)] + [(2, 2), (3, 4)]
WIDTHS += [pytest.param(8, 8, marks=needs_vnni)]


def members(net: nn.Module) -> int:
    return len(net) if isinstance(net, Ensemble) else 1


def allowed(total: int) -> float:
    """1 in 10,000; layers this small have a few thousand outputs, of which 3 may be ties."""
    return max(3, total / 10_000)


def assert_layers_agree(made: nn.Module, integer: nn.Module, x: Tensor, index: int) -> None:
    for name, found in disagreements(made, integer, x, index).items():
        assert found.differing <= allowed(found.total), (name, found)
        assert found.largest <= 1, (name, found)


@pytest.mark.parametrize(("weight_bits", "activation_bits"), WIDTHS)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_int8_layer_gives_the_simulated_integers(
    method: str, net: str, weight_bits: int, activation_bits: int, simulated: Make
) -> None:
    made = simulated(method, net, weight_bits=weight_bits, activation_bits=activation_bits)
    integer = convert(copy.deepcopy(made), "fbgemm")
    for index in range(members(made)):
        assert_layers_agree(made, integer, inputs(net), index)


@pytest.mark.parametrize("engine", ["x86", "onednn"])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_other_engines_give_them_too(method: str, net: str, engine: str, simulated: Make) -> None:
    made = simulated(method, net, weight_bits=4, engine=engine)
    integer = convert(copy.deepcopy(made), engine)
    assert_layers_agree(made, integer, inputs(net), index=0)


def in_float64(layer: SimulatedLayer, x: Tensor) -> Tensor:
    """The outputs before rounding, from the layer's integers and scales."""
    assert isinstance(layer, SimulatedPointLayer)
    factor, bias = layer.fold()
    integers = layer.weight_quant.integers(layer.folded_weight(factor)).double()
    scale = layer.weight_quant.along(integers, layer.weight_quant.scale.double())
    out = layer.linear_map(x.double(), integers * scale, None if bias is None else bias.double())
    return out.relu() if layer.relu else out


@pytest.mark.parametrize("engine", ["fbgemm", "x86", "onednn"])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ["pointwise", "mcdropout"])
def test_what_differs_is_a_rounding_tie(
    method: str, net: str, engine: str, simulated: Make
) -> None:
    made = simulated(method, net, weight_bits=8)
    integer = convert(copy.deepcopy(made), engine)
    checked = 0
    for twin in twins(made, integer, inputs(net, rows=512)):
        if isinstance(twin.module, SimulatedLayer):
            quant = twin.module.output_quant
            exact = in_float64(twin.module, twin.inputs[0])
            steps = exact / quant.scale.double() + quant.zero_point
            from_tie = (steps - steps.floor() - 0.5).abs()
            inside = (steps > quant.quant_min) & (steps < quant.quant_max)
            correct = steps.round().clamp(quant.quant_min, quant.quant_max)
            for integers in (twin.got, twin.expected):
                wrong = (integers != correct) & inside
                assert not (wrong & (from_tie > 1e-3)).any(), twin.name
                assert wrong.float().mean() < 1e-4, twin.name
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 7), (4, 7), (8, 4), (2, 2)])
@pytest.mark.parametrize("net", ["mlp", "lenet"])
@pytest.mark.parametrize("method", METHODS)
def test_whole_networks_agree(
    method: str, net: str, weight_bits: int, activation_bits: int, simulated: Make
) -> None:
    made = simulated(method, net, weight_bits=weight_bits, activation_bits=activation_bits)
    integer = convert(copy.deepcopy(made), "fbgemm")
    x = inputs(net, rows=128)
    expected, got = (predictive(n, x, members(made)) for n in (made, integer))
    assert (expected != got).float().mean() < 1e-2
    assert (expected - got).abs().mean() < 1e-3 * expected.abs().mean()


@pytest.mark.parametrize("method", METHODS)
def test_a_resnet_predicts_the_same_classes(method: str, simulated: Make) -> None:
    made = simulated(method, "resnet")
    integer = convert(copy.deepcopy(made), "fbgemm")
    x = inputs("resnet", rows=256)
    expected, got = (predictive(n, x, members(made)).softmax(-1).mean(0) for n in (made, integer))
    assert (expected.argmax(-1) != got.argmax(-1)).float().mean() <= 0.02
    assert (expected - got).abs().mean() < 0.002


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
            module.register_forward_hook(lambda _, __, out: seen.append(int(out.int_repr().max())))
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
    x = torch.quantize_per_tensor(torch.randn(64, 50), 0.05, 60, torch.quint8)
    dropout = MCDropout(0.25)
    reseed(x.device, 1)
    got = IntegerDropout(dropout)(x)
    reseed(x.device, 1)
    expected = dropout(x.dequantize())
    dropped = expected == 0
    assert torch.equal(got.int_repr()[~dropped], x.int_repr()[~dropped])
    assert (got.int_repr()[dropped] == 60).all()
    assert got.q_scale() == pytest.approx(0.05 / 0.75)
    assert torch.allclose(got.dequantize(), expected)


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
