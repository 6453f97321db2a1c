"""Reconstruction: errors with known answers, and the forms that keep the integers."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bqnn.inference.predict import predictive
from bqnn.layers.linear_map import Geometry
from bqnn.layers.markers import Enter, Leave
from bqnn.quant import reconstruction
from bqnn.quant.fake_quant import FakeQuant, make_fake_quant
from bqnn.quant.fuse import fuse
from bqnn.quant.quantize import prepare_qat, quantize
from bqnn.quant.reconstruction import Moments, calibrate_by, descend, reconstruct
from bqnn.quant.simulated import SimulatedLayer, calibrate, enable, prepare
from bqnn.quant.spec import QuantSpec
from bqnn.quant.summary import simulated_layers, weight_integers
from tests.quant.conftest import SHAPES, float_net, inputs


def weight_grid(weight: Tensor, bits: int, **options: Any) -> FakeQuant:
    quant = make_fake_quant(bits, signed=True, channels=len(weight), **options).train()
    quant(weight)
    return quant.eval()


def output_error(weight: Tensor, rounded: Tensor, x: Tensor, q: Tensor) -> Tensor:
    return (x @ weight.mT - q @ rounded.mT).square().mean()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_of_the_outputs_is_not_above_that_of_the_nearest_integers(bits: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 20), torch.randn(300, 4) @ torch.randn(4, 20)
    quant = weight_grid(weight, bits, symmetric=True)
    rounded = descend(weight, Moments.of(x, x), quant)
    assert torch.equal(quant.round(rounded), rounded)  # on the grid
    nearest = output_error(weight, quant.round(weight), x, x)
    assert output_error(weight, rounded, x, x) < 0.7 * nearest


def test_it_finds_the_best_integers_of_two_weights() -> None:
    torch.manual_seed(0)
    weight = torch.tensor([[0.45, 0.35]])
    quant = make_fake_quant(2, signed=True, channels=1)
    quant.scale.fill_(1)
    x = torch.randn(100, 1) @ torch.tensor([[1.0, 1.1]]) + 0.1 * torch.randn(100, 2)
    candidates = [torch.tensor([[a, b]]) for a, b in product((-2.0, -1.0, 0.0, 1.0), repeat=2)]
    best = min(candidates, key=lambda each: float(output_error(weight, each, x, x)))
    assert torch.equal(descend(weight, Moments.of(x, x), quant), best)


def test_integers_make_up_for_the_rounding_of_the_inputs() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 16), torch.randn(500, 16)
    quant, q = weight_grid(weight, 8), 0.5 * x  # inputs that lost half of their size
    rounded = descend(weight, Moments.of(x, q), quant)
    assert rounded.abs().mean() > 1.2 * weight.abs().mean()  # up to the ends of the grid
    assert output_error(weight, rounded, x, q) < output_error(weight, quant.round(weight), x, q)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_moments_of_patches_are_those_of_a_convolution(groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2, groups=groups, bias=False).double()
    x, q = torch.randn(2, 10, 4, 9, 9, dtype=torch.float64)
    moments = Moments.of(x, q, (3, 3), Geometry.of(conv))
    weight = conv.weight.flatten(1).unflatten(0, (groups, -1))  # [G, C / G, D]
    means = (weight @ moments.x.unsqueeze(2)).flatten()
    assert torch.allclose(means, conv(x).mean((0, 2, 3)))
    squares = (weight @ moments.qq @ weight.mT).diagonal(dim1=1, dim2=2).flatten()
    assert torch.allclose(squares, conv(q).square().mean((0, 2, 3)))
    products = (weight @ moments.xq @ weight.mT).diagonal(dim1=1, dim2=2).flatten()
    assert torch.allclose(products, (conv(x) * conv(q)).mean((0, 2, 3)))
    variances = (weight @ moments.centered().qq @ weight.mT).diagonal(dim1=1, dim2=2).flatten()
    assert torch.allclose(variances, conv(q).transpose(0, 1).flatten(1).var(1, correction=0))


def test_few_rows_are_used_if_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, 4)
    monkeypatch.setattr(reconstruction, "MOST_PATCHES", 10)
    assert torch.equal(Moments.of(x, x).x, Moments.of(x[:32], x[:32]).x)  # 32 at once
    monkeypatch.setattr(reconstruction, "MOST_VALUES", 7 * 4)  # of the inputs of its only layer
    spec = QuantSpec(weight_bits=2, bias_correction=True)
    net = nn.Sequential(Enter(), nn.Linear(4, 2), Leave())
    made = calibrate(prepare(fuse(net), spec), [x])
    other = copy.deepcopy(made)
    for each, rows in ((made, x), (other, x[:7])):
        reconstruct(each, rows, weights=False, bias=True)
    assert torch.equal(made[1].bias, other[1].bias)


@pytest.mark.parametrize("rounding", ["nearest", "adaptive"])
@pytest.mark.parametrize("bias", [False, True])
def test_bias_correction_leaves_no_mean_error_of_a_layer(bias: bool, rounding: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Enter(), nn.Linear(12, 5, bias=bias), Leave())
    x = torch.rand(200, 12)
    errors = []
    for corrects in (False, True):
        spec = QuantSpec(weight_bits=2, weight_rounding=rounding, bias_correction=corrects)
        made = calibrate_by(spec, prepare(fuse(copy.deepcopy(net)), spec), [x[:100], x[100:]])
        with torch.enable_grad():  # floats that the output's grid rounds last
            rounded = made[0](x)
            outputs = made[1].before_rounding(rounded.as_subclass(Tensor))
        errors.append((outputs - net(x)).mean(0).abs().max().item())
    assert errors[1] < 1e-6 < 1e-3 < errors[0]


@pytest.mark.parametrize("net", SHAPES)
@pytest.mark.parametrize("method", ["pointwise", "bbb", "mcdropout", "sghmc"])
def test_outputs_come_closer_to_the_float_network(method: str, net: str) -> None:
    x, errors = inputs(net, 256), []
    expected = predictive(float_net(method, net), x, 2 if method == "sghmc" else 50)
    for options in ({}, {"weight_rounding": "adaptive", "bias_correction": True}):
        spec = QuantSpec(weight_bits=3, activation_bits=8, **options)
        made = calibrate_by(spec, prepare(fuse(float_net(method, net)), spec), [x])
        difference = predictive(made, x, len(expected)) - expected
        errors.append(difference.mean(0).square().mean().item())
    assert errors[1] < 0.7 * errors[0]


def test_stored_weights_are_the_floats_of_their_integers() -> None:
    spec = QuantSpec(weight_bits=3, weight_rounding="adaptive")
    made = calibrate_by(
        spec, prepare(fuse(float_net("pointwise", "resnet")), spec), [inputs("resnet")]
    )
    start = prepare(fuse(float_net("pointwise", "resnet")), spec)
    moved = []
    for name, layer in simulated_layers(made):
        (weights,), before = weight_integers(layer), start.get_submodule(name)
        assert isinstance(before, SimulatedLayer)
        assert (weights.steps - weights.values).abs().max() < 1e-4  # far from a tie
        before.weight_quant.load_state_dict(layer.weight_quant.state_dict())
        moved.append((weight_integers(before)[0].values != weights.values).float().mean().item())
    assert all(0 < share < 0.6 for share in moved)
    enable(made, False)  # the unquantized network has the same weights
    assert made(inputs("resnet")).isfinite().all()


def test_a_dead_channel_of_batch_norm_keeps_its_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        Enter(), nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), Leave()
    )
    nn.init.zeros_(net[2].weight[:1])
    before = net[1].weight.detach().clone()
    spec = QuantSpec(weight_bits=2, weight_rounding="adaptive", bias_correction=True)
    made = calibrate_by(spec, prepare(fuse(net.eval()), spec), [torch.randn(8, 1, 6, 6)])
    weight = made[1].weight
    assert torch.equal(weight[0], before[0])
    assert not torch.equal(weight[1], before[1])


def test_quantize_reconstructs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    x = torch.randn(256, 12)
    plain, better = (
        quantize(net, [x], QuantSpec(weight_bits=3, activation_observer="histogram", **options))
        for options in ({}, {"weight_rounding": "adaptive", "bias_correction": True})
    )
    errors = [(quantized(x) - net(x)).square().mean() for quantized in (plain, better)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("options", [{"weight_rounding": "adaptive"}, {"bias_correction": True}])
def test_training_refuses_them(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*only calibration"):
        prepare_qat(nn.Linear(3, 2), QuantSpec(**options))


def test_means_that_are_not_rounded_are_refused() -> None:
    with pytest.raises(ValueError, match="strategy=weights rounds only drawn weights"):
        QuantSpec(weight_rounding="adaptive", strategy="weights")
