"""Fused and fake-quantized networks: results, observers and refused networks."""

import copy

import pytest
import torch
from torch import nn

from bqnn.inference.predict import predictive
from bqnn.layers.bayes import kl_divergence
from bqnn.layers.markers import Enter, Leave
from bqnn.quant.fake_quant import FakeQuant, make_fake_quant
from bqnn.quant.fuse import Fused, fuse
from bqnn.quant.simulated import (
    SimulatedGaussianLayer,
    SimulatedLayer,
    calibrate,
    enable,
    freeze,
    prepare,
)
from bqnn.quant.spec import QuantSpec
from bqnn.quant.stochastic import GaussianGrids, LogFakeQuant, round_noise
from bqnn.quant.summary import weight_integers
from tests.quant.conftest import Make, float_net, inputs

METHODS = ("pointwise", "bbb", "mcdropout", "sghmc")
NETS = ("mlp", "lenet", "resnet")


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_fusing_changes_no_bit(method: str, net: str) -> None:
    x = inputs(net)
    expected = predictive(float_net(method, net), x, 2)
    assert torch.equal(predictive(fuse(float_net(method, net)), x, 2), expected)


def test_fusing_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="already fused"):
        fuse(fuse(float_net("pointwise", "mlp")))
    with pytest.raises(ValueError, match="no linear layer"):
        fuse(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match=r"1 is a BatchNorm2d"):
        fuse(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))
    with pytest.raises(TypeError, match="Conv1d"):
        fuse(nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1)))


def test_only_direct_neighbours_are_fused() -> None:
    net = fuse(nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.ReLU(), nn.Linear(2, 2)))
    fused = [module for module in net.children() if isinstance(module, Fused)]
    assert [module.relu for module in fused] == [False, False]
    assert isinstance(net[2], nn.ReLU)

    class Reversed(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[0](self[1](x))

    net = fuse(Reversed(nn.Linear(2, 2), nn.ReLU()))
    assert not net[0].relu
    assert isinstance(net[1], nn.ReLU)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_without_rounding_it_computes_what_it_did_in_float(
    method: str, net: str, simulated: Make
) -> None:
    made = simulated(method, net)
    rounded = predictive(made, inputs(net), 2)
    enable(made, False)
    expected = predictive(float_net(method, net), inputs(net), 2)
    got = predictive(made, inputs(net), 2)
    assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(rounded, expected, atol=1e-4)


@pytest.mark.parametrize("method", ["pointwise", "mcdropout"])
def test_batch_norm_learns_as_it_did(method: str) -> None:
    nets = [float_net(method, "resnet"), float_net(method, "resnet")]
    prepare(fuse(nets[1]), QuantSpec())
    enable(nets[1], False)
    for net in nets:
        torch.manual_seed(0)
        net.train()(inputs("resnet"))
    plain, prepared = ([m for m in n.modules() if type(m) is nn.BatchNorm2d] for n in nets)
    assert len(plain) == len(prepared) == 6
    for a, b in zip(plain, prepared, strict=True):
        assert torch.allclose(a.running_mean, b.running_mean, atol=1e-4)
        assert torch.allclose(a.running_var, b.running_var, rtol=1e-3)


@pytest.mark.parametrize("method", ["pointwise", "bbb"])
def test_a_batch_norm_factor_of_zero_stays_finite(method: str) -> None:
    net = float_net(method, "resnet")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[0] = 0
    prepare(fuse(net), QuantSpec())
    net.train()(inputs("resnet")).square().mean().backward()
    for name, param in net.named_parameters():
        assert param.grad is not None, name
        assert param.grad.isfinite().all(), name
    assert net.eval()(inputs("resnet")).isfinite().all()


def test_ranges_move_in_training_mode_only_and_until_frozen() -> None:
    net = prepare(fuse(float_net("bbb", "lenet")), QuantSpec())
    x = inputs("lenet")
    net.train()(x)
    before = copy.deepcopy(_scales(net))
    net.eval()(5 * x)
    assert all(torch.equal(before[name], scale) for name, scale in _scales(net).items())
    freeze(net)
    net.train()(5 * x)
    assert all(torch.equal(before[name], scale) for name, scale in _scales(net).items())
    freeze(net, False)
    net.train()(5 * x)
    assert not torch.equal(
        before["features.0.output_quant"], _scales(net)["features.0.output_quant"]
    )


def _scales(net: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: m for name, m in net.named_modules() if isinstance(m, FakeQuant)}
    return {name: module.scale.clone() for name, module in found.items()}


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    net = prepare(fuse(float_net("pointwise", "resnet")), QuantSpec())
    net.train()(inputs("resnet"))
    freeze(net)
    before = {name: b.clone() for name, b in net.named_buffers() if "running" in name}
    net.train()(inputs("resnet"))
    after = dict(net.named_buffers())
    assert len(before) == 12
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())


def test_the_kl_is_that_of_the_float_network(simulated: Make) -> None:
    expected = kl_divergence(float_net("bbb", "lenet"))
    assert torch.equal(kl_divergence(simulated("bbb", "lenet")), expected)


def test_local_reparametrization_and_sampling_share_their_moments() -> None:
    net = prepare(fuse(float_net("bbb", "lenet")), QuantSpec())
    enable(net, False)
    layer = next(m for m in net.modules() if isinstance(m, SimulatedGaussianLayer))
    x = inputs("lenet", rows=2)
    with torch.no_grad():
        train, drawn = (
            torch.stack([layer.train(mode)(x) for _ in range(4000)]) for mode in (True, False)
        )
    error = drawn.std(0) / 4000**0.5
    assert ((train.mean(0) - drawn.mean(0)).abs() < 8 * error).all()
    assert torch.allclose(train.std(0), drawn.std(0), rtol=0.15)


@pytest.mark.parametrize(("strategy", "levels"), [("both", 8), ("weights", 8), ("parameters", 256)])
def test_strategies_put_drawn_weights_on_their_grids(
    strategy: str, levels: int, simulated: Make
) -> None:
    net = simulated("bbb", "lenet", weight_bits=3, strategy=strategy)
    largest = 0
    for layer in net.modules():
        if isinstance(layer, SimulatedGaussianLayer):
            weight = layer.draw()
            for channel in weight.flatten(1):
                largest = max(largest, len(channel.unique()))
            stored = {w.name: w for w in weight_integers(layer)}
            assert ("sigma" in stored) == (strategy != "weights")
            assert int(stored["mean"].values.max()) <= 3
    assert largest <= levels
    assert largest > levels / 8


@pytest.mark.parametrize("strategy", ["both", "weights"])
@pytest.mark.parametrize("weight_bits", [2, 4])
def test_noise_that_is_rounded_stochastically_keeps_its_variance(
    weight_bits: int, strategy: str
) -> None:
    spec = QuantSpec(weight_bits=weight_bits, strategy=strategy, rounding="stochastic")
    grids = GaussianGrids(spec, 2).train()
    mean = torch.tensor([0.0, 0.0, 1.0]).expand(2, 20_000, 3).reshape(2, -1)
    sigma = torch.full_like(mean, 0.1)  # far below half a step
    rounded = grids.parameters_on_grid(mean, sigma)
    with torch.no_grad():
        noise = grids.draw(*rounded, torch.randn(mean.shape)) - grids.weight.round(rounded[0])
    inside = mean < 0.5  # the largest values are at the end of the range
    assert noise[inside].mean().abs() < 0.003
    assert noise[inside].std().item() == pytest.approx(0.1, rel=0.03)


def test_noise_below_half_a_step_is_rounded_to_nothing_or_a_step() -> None:
    noise = torch.tensor([0.0, 0.5, -0.5, 1.0, -2.0, 2.5])
    uniform = torch.tensor([0.0, 0.24, 0.26, 0.0, 0.0, 0.46])
    # P(up) of 0.5 is 1/4, that of 2.5 is (6.25 - 4) / 5 = 0.45.
    assert round_noise(noise, uniform).tolist() == [0, 1, 0, 1, -2, 2]


def test_overrides_change_single_layers(simulated: Make) -> None:
    overrides = [
        {"layer": "output.*", "weight_bits": 8},
        {"layer": "features.0", "activation_bits": 8},
    ]
    net = simulated("pointwise", "lenet", weight_bits=3, overrides=overrides)
    bits = {n: m.weight_quant.bits for n, m in net.named_modules() if isinstance(m, SimulatedLayer)}
    assert bits == {"features.1": 3, "features.4": 3, "features.8": 3, "output.heads.0.linear": 8}
    assert net.features[0].output_quant.bits == 8
    assert net.features[1].output_quant.bits == 7
    with pytest.raises(ValueError, match=r"matches no layer; choose from features.0, features.1"):
        simulated("pointwise", "lenet", overrides=[{"layer": "conv*", "weight_bits": 8}])


def output_layers(net: nn.Module) -> dict[str, int]:
    """Return the layers that end the integer region, with the bits of their outputs."""
    layers = {n: m for n, m in net.named_modules() if isinstance(m, SimulatedLayer)}
    return {n: m.output_quant.bits for n, m in layers.items() if m.is_output}


@pytest.mark.parametrize("net", NETS)
def test_outputs_have_bits_of_their_own(net: str, simulated: Make) -> None:
    made = simulated("bbb", net, activation_bits=3, output_bits=8)
    assert output_layers(made) == {"output.heads.0.linear": 8}
    inner = [m for m in made.modules() if hasattr(m, "output_quant") and m.output_quant.bits == 3]
    assert len(inner) >= 3
    override = {"layer": "output.*", "activation_bits": 5}
    made = simulated("pointwise", net, output_bits=8, overrides=[override])
    assert output_layers(made) == {"output.heads.0.linear": 5}
    assert output_layers(simulated("pointwise", net)) == {"output.heads.0.linear": 7}


def test_the_layer_before_leave_gives_the_outputs() -> None:
    net = nn.Sequential(Enter(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), Leave())
    assert output_layers(prepare(fuse(net), QuantSpec(activation_bits=2))) == {"3": 8}


def test_prepare_refuses_a_network_without_an_integer_region() -> None:
    with pytest.raises(ValueError, match="call fuse"):
        prepare(float_net("pointwise", "mlp"), QuantSpec())
    with pytest.raises(ValueError, match="put an Enter"):
        prepare(fuse(nn.Sequential(nn.Linear(2, 2))), QuantSpec())


def test_calibration_sets_every_range_and_trains_nothing() -> None:
    net = prepare(fuse(float_net("bbb", "resnet")), QuantSpec(activation_observer="histogram"))
    before = {name: param.clone() for name, param in net.named_parameters()}
    calibrate(net, [inputs("resnet"), 2 * inputs("resnet")])
    assert all(m.has_range for m in net.modules() if isinstance(m, FakeQuant))
    assert all(torch.equal(before[name], param) for name, param in net.named_parameters())
    assert not any(module.training for module in net.modules())


def test_calibration_sets_the_log_grid_of_sigma() -> None:
    net = prepare(fuse(float_net("bbb", "mlp")), QuantSpec(sigma_grid="log", weight_bits=4))
    layer = next(m for m in net.modules() if isinstance(m, SimulatedGaussianLayer))
    with torch.no_grad():  # from 0.01 to 1
        layer.rho.copy_(torch.linspace(-4.6, 0.54, layer.rho.numel()).view_as(layer.rho))
    calibrate(net, [inputs("mlp")])
    sigma, grid = layer.sigma.detach(), layer.grids.sigma
    assert isinstance(grid, LogFakeQuant)
    with torch.no_grad():
        rounded = grid(sigma)
    assert torch.allclose(grid.log_max.exp(), sigma.amax(1))
    for row, found in zip(sigma, rounded, strict=True):
        half_a_level = (row.max() / row.min()) ** (1 / 30)
        assert (found / row).max() <= half_a_level * 1.001
        assert (row / found).max() <= half_a_level * 1.001


@pytest.mark.parametrize("channels", [None, 5])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_fake_quant_rounds_to_the_nearest_level(
    bits: int, symmetric: bool, channels: int | None
) -> None:
    quant = make_fake_quant(bits, signed=True, symmetric=symmetric, channels=channels)
    x = torch.randn(5, 40, requires_grad=True)
    rounded = quant(x)
    integers = quant.integers(x)
    assert torch.equal(quant.dequantize(integers), rounded)
    scale, zero = (v.float().reshape(-1, 1) for v in (quant.scale, quant.zero_point))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    expected = (x / scale + zero).detach()
    from_tie = (expected - expected.floor() - 0.5).abs()  # torch multiplies by 1 / scale
    is_right = expected.round().clamp(low, high) == integers.float()
    assert (is_right | (from_tie < 1e-3)).all()
    rounded.sum().backward()
    steps = x / scale + zero
    inside = (steps > low - 0.5) & (steps < high + 0.5)
    on_edge = ((steps - low + 0.5).abs() < 1e-3) | ((steps - high - 0.5).abs() < 1e-3)
    assert torch.equal(x.grad[~on_edge], inside.float()[~on_edge])  # straight through
    if not symmetric:
        assert ((rounded - x).abs() <= scale / 2 * 1.01).all()


def test_small_standard_deviations_survive() -> None:
    sigma = torch.full((2, 8), 1e-9)
    quant = make_fake_quant(4, signed=False, channels=2)
    assert torch.allclose(quant(sigma), sigma)


def test_log_grid_has_equal_ratios_and_keeps_both_ends() -> None:
    sigma = torch.logspace(-5, -1, 1000).reshape(1, -1)
    quant = LogFakeQuant(3, channels=1)
    levels = quant(sigma).unique()
    assert len(levels) == 8
    ratios = levels[1:] / levels[:-1]
    assert torch.allclose(ratios, ratios.mean().expand(7), rtol=1e-3)
    assert levels[0].item() == pytest.approx(1e-5, rel=1e-3)
    assert levels[-1].item() == pytest.approx(1e-1, rel=1e-3)
    assert torch.equal(quant.dequantize(quant.integers(sigma)), quant.eval()(sigma))


def test_enter_and_leave_are_all_a_foreign_network_needs() -> None:
    net = nn.Sequential(Enter(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), Leave())
    prepare(fuse(net), QuantSpec())
    assert net.train()(torch.randn(3, 4)).shape == (3, 2)
