"""int8 layers compute exactly the integers of the simulation."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from bqnn.quant.fbgemm import can_saturate, has_vnni
from bqnn.quant.saturation import refuse_saturation
from torch import Tensor, nn

from bqnn.arguments import ArgumentError
from bqnn.inference.predict import predictive
from bqnn.layers.bayes import to_bayes
from bqnn.layers.draws import held_draw
from bqnn.layers.dropout import MCDropout, to_mcdropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.markers import DropoutSite, Enter, Leave
from bqnn.quant import fbgemm
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import IntegerDropout, convert
from bqnn.quant.quantize import prepare_qat, quantize
from bqnn.quant.simulated import SimulatedLayer, calibrate, prepare
from bqnn.quant.spec import QuantSpec
from bqnn.quant.summary import comparison_noise, disagreements, twins, weight_integers
from tests.quant.conftest import Make, float_net, inputs

METHODS = ("pointwise", "bbb", "mcdropout", "sghmc")
NETS = ("mlp", "lenet", "resnet")
BITS = range(2, 9)
ENGINES = ("fbgemm", "x86", "onednn")
SCHEMES: dict[str, dict] = {  # beside the default, one symmetric scale per output channel
    "tensor": {"weight_granularity": "tensor", "weight_symmetric": False},
    "affine": {"weight_symmetric": False},
    "parameters": {"strategy": "parameters"},
    "weights": {"strategy": "weights"},
    "log": {"sigma_grid": "log"},
}


def members(net: nn.Module) -> int:
    return len(net) if isinstance(net, Ensemble) else 1


def assert_same_integers(made: nn.Module, engine: str, x: Tensor) -> None:
    """Compare every layer on the inputs of its simulated twin, and the whole network."""
    integer = convert(copy.deepcopy(made), engine)
    for index in range(members(made)):
        for name, found in disagreements(made, integer, x, index).items():
            assert found.differing == 0, (name, found)
    expected, got = (predictive(net, x, members(made)) for net in (made, integer))
    assert torch.equal(expected, got)


@pytest.mark.parametrize("weight_bits", BITS)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_int8_computes_the_simulated_integers(
    method: str, net: str, weight_bits: int, simulated: Make
) -> None:
    for activation_bits in BITS:
        if can_saturate(weight_bits, activation_bits) and not has_vnni():
            continue  # 16 bits do not hold the sum of two such products
        made = simulated(method, net, weight_bits=weight_bits, activation_bits=activation_bits)
        assert_same_integers(made, "fbgemm", inputs(net))


def saturates(made: nn.Module) -> bool:
    """Return whether the sums of a layer can be wrong on this CPU."""
    try:
        refuse_saturation(made)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("engine", ["x86", "onednn"])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_other_engines_compute_them_too(
    method: str, net: str, engine: str, simulated: Make
) -> None:
    for weight_bits, activation_bits in ((8, 8), (8, 7), (4, 7), (2, 2)):
        made = simulated(
            method,
            net,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            engine=engine,
        )
        if activation_bits < 8 or not saturates(made):  # what does is refused, see below
            assert_same_integers(made, engine, inputs(net))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("net", NETS)
def test_other_schemes_compute_them_too(net: str, scheme: str, simulated: Make) -> None:
    for method in ("pointwise", "bbb"):
        for engine in ("fbgemm", "x86"):
            made = simulated(method, net, weight_bits=4, engine=engine, **SCHEMES[scheme])
            assert_same_integers(made, engine, inputs(net))


def test_sums_that_no_float32_holds_are_exact() -> None:
    net = nn.Sequential(Enter(), nn.Linear(4096, 8, bias=False), Leave())
    nn.init.uniform_(net[1].weight, 0.5, 1)  # sums of about 4096 * 0.75 * 127 * 0.75 * 255
    x = torch.rand(32, 4096)
    spec = QuantSpec(activation_bits=8, activation_observer="minmax")
    made = calibrate(prepare(fuse(net), spec), [x])
    if has_vnni():
        assert_same_integers(made, "fbgemm", x)
    weight, grid = made[1].rounded_weight(None).detach(), made[1].weight_grid
    integers = (weight / grid.scale.reshape(-1, 1)).round()
    whole = torch.randint(256, (32, 4096)).float()
    exact = whole.double() @ integers.double().T
    assert exact.max() > 2**24
    assert torch.equal(made[1].exact_sums(whole, integers, 255), exact.float())


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
    for engine in ENGINES:
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
    assert num_layers >= 3 * len(ENGINES)
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
    torch.manual_seed(1)
    got = IntegerDropout(dropout)(x)
    torch.manual_seed(1)
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


def small_conv(groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(16, 16, 3, padding=1, groups=groups)
    return nn.Sequential(Enter(), layer, nn.ReLU(), nn.Flatten(), nn.Linear(576, 3), Leave())


def calibrated(net: nn.Module, x: Tensor, **options: object) -> nn.Module:
    spec = QuantSpec(activation_observer="minmax", **options)
    return calibrate(prepare(fuse(net), spec), [x])


IMAGES = torch.randn(8, 16, 6, 6, generator=torch.Generator().manual_seed(0))


def test_saturating_bits_are_refused_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fbgemm, "has_vnni", lambda: False)
    net = calibrated(small_conv(), IMAGES, activation_bits=8)
    with pytest.raises(
        ValueError, match=r"the first is 1\) would saturate .*bits=7, .* with allow_sat"
    ):
        convert(copy.deepcopy(net), "fbgemm")
    convert(copy.deepcopy(net), "fbgemm", allow_saturation=True)
    assert "can differ from the simulation" in caplog.text
    asked = calibrated(small_conv(), IMAGES, activation_bits=8, allow_saturation=True)
    convert(asked, "fbgemm")
    for bits in ({"activation_bits": 7}, {"activation_bits": 8, "weight_bits": 7}):
        convert(calibrated(small_conv(), IMAGES, **bits), "fbgemm")


def test_depthwise_kernels_are_refused_where_they_saturate() -> None:
    """FBGEMM sums their products in 16 bits, even on CPUs with VNNI."""
    x = 255 * torch.ones(8, 16, 6, 6)
    net = small_conv(groups=16)
    nn.init.constant_(net[1].weight, 1)
    nn.init.zeros_(net[1].bias)
    made = calibrated(net, x, activation_bits=8)
    if saturates(made):
        with pytest.raises(ValueError, match="would saturate on this CPU"):
            convert(made, "fbgemm")
    else:
        assert_same_integers(made, "fbgemm", x)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["pointwise", "bbb", "mcdropout", "sghmc"])
def test_linear_layers_take_any_number_of_leading_dimensions(method: str, engine: str) -> None:
    for shape in ((8, 12, 16), (5, 3, 4, 16), (7, 16), (16,)):
        torch.manual_seed(0)
        net: nn.Module = nn.Sequential(
            Enter(), nn.Linear(16, 24), nn.ReLU(), DropoutSite(), nn.Linear(24, 12), Leave()
        )
        if method == "bbb":
            to_bayes(net, 0.3, -3.0)
        elif method == "mcdropout":
            to_mcdropout(net, 0.3)
        elif method == "sghmc":
            net = Ensemble(net, 1)
            net.collect()
        x = torch.randn(shape)
        made = calibrated(net.eval(), x, engine=engine)
        noise = [comparison_noise() for _ in range(2)]
        with held_draw(made, 0, noise[0]), torch.no_grad():
            expected = made(x)
            rows = made(x.reshape(-1, 16)) if method != "mcdropout" else None
        assert expected.shape == (*shape[:-1], 12)
        assert rows is None or torch.equal(rows.reshape(expected.shape), expected)
        integer = convert(made, engine)
        with held_draw(integer, 0, noise[1]):
            assert torch.equal(integer(x), expected)


def test_images_without_a_batch_dimension_are_refused_in_one_line() -> None:
    made = calibrated(small_conv(), IMAGES)
    for net in (made, convert(copy.deepcopy(made), "fbgemm")):
        with pytest.raises(ValueError, match=r"takes \[B, C, H, W\]; add the batch dimension"):
            net(IMAGES[0])


def test_a_probe_refuses_other_integers_and_warns_of_ties(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = calibrated(small_conv(), IMAGES)
    convert(copy.deepcopy(made), "fbgemm", probe=IMAGES)
    assert not caplog.text
    run = fbgemm.PackedWeight.__call__

    def off(steps: int) -> object:
        def other(self: object, x: Tensor, relu: bool, scale: float, zero_point: int) -> Tensor:
            out = run(self, x, relu, scale, zero_point)
            integers = (out.int_repr().int() + steps).clamp(0, 255).to(torch.uint8)
            return torch._make_per_tensor_quantized_tensor(integers, scale, zero_point)

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
    for net in (prepare_qat(with_dropout()), quantize(with_dropout(), [torch.randn(8, 4)])):
        with pytest.raises(ArgumentError, match=f"quantized already; call {change.__name__} on"):
            change(net)


def test_the_mode_of_an_int8_network_does_not_matter() -> None:
    x = torch.randn(8, 4)
    integer = quantize(with_dropout(), [x])
    assert torch.equal(integer.train()(x), integer.eval()(x))
