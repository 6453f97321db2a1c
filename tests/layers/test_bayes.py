"""Gaussian weights: KL and sigma against torch, output draws against their moments."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl
from torch.nn import functional as F

from bqnn.layers.bayes import (
    BayesConv2d,
    BayesLinear,
    GaussianWeight,
    JointPosterior,
    held_means,
    kl_divergence,
    to_bayes,
)
from bqnn.layers.linear_map import Geometry, linear_map
from bqnn.layers.noise import noise_like

CONVOLUTIONS = {
    "strided": {"stride": 2, "padding": 1},
    "grouped": {"padding": 1, "groups": 2},
    "dilated": {"padding": 2, "dilation": 2},
}


def bayes_linear(dtype: torch.dtype = torch.float32) -> BayesLinear:
    torch.manual_seed(0)
    layer = BayesLinear.like(nn.Linear(5, 3), prior_std=0.7, init_rho=-1.0).to(dtype)
    nn.init.normal_(layer.rho, mean=-1)
    return layer


def bayes_conv(in_channels: int = 4, bias: bool = True, **geometry: int) -> BayesConv2d:
    torch.manual_seed(0)
    plain = nn.Conv2d(in_channels, 6, 3, bias=bias, **geometry)
    layer = BayesConv2d.like(plain, prior_std=0.7, init_rho=-1.0)
    nn.init.normal_(layer.rho, mean=-1)
    return layer


def plain_map(layer: GaussianWeight, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply torch's own functions to `x` with these weights."""
    if isinstance(layer, BayesConv2d):
        return F.conv2d(x, weight, bias, *layer.geometry)
    return F.linear(x, weight, bias)


def assert_moments(draws: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Allow 5 standard errors: sigma / sqrt(n) of a mean, sqrt(2 / n) of a variance."""
    num_draws = len(draws)
    scale = variance.sqrt().clamp_min(1e-6)
    assert ((draws.mean(0) - mean) / scale).abs().max() < 5 / math.sqrt(num_draws)
    assert (draws.var(0) / variance - 1).abs().max() < 5 * math.sqrt(2 / num_draws)


def layers_and_inputs() -> list:
    linear = pytest.param(bayes_linear(), (2, 5), id="linear")
    convs = [
        pytest.param(bayes_conv(**geometry), (2, 4, 7, 6), id=name)
        for name, geometry in CONVOLUTIONS.items()
    ]
    return [linear, *convs]


@pytest.mark.parametrize("prior_std", [0.1, 1.0, 3.0])
def test_kl_is_that_of_torch_summed_over_the_weights(prior_std):
    layer = bayes_linear(torch.float64)
    layer.prior_std = prior_std
    posterior = Normal(layer.mean, F.softplus(layer.rho))
    prior = Normal(torch.zeros_like(layer.mean), torch.full_like(layer.mean, prior_std))
    expected = torch_kl(posterior, prior).sum()
    torch.testing.assert_close(kl_divergence(layer), expected, rtol=1e-12, atol=0)

    parameters = [layer.mean, layer.rho]
    gradients = torch.autograd.grad(kl_divergence(layer), parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters))


def test_kl_of_the_prior_is_zero_and_its_gradient_too():
    layer = bayes_linear(torch.float64)
    nn.init.zeros_(layer.mean)
    layer.set_sigma(torch.full_like(layer.mean, layer.prior_std))
    gradients = torch.autograd.grad(kl_divergence(layer), [layer.mean, layer.rho])
    torch.testing.assert_close(kl_divergence(layer), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(gradients, tuple(map(torch.zeros_like, gradients)))


def test_kl_of_a_network_is_the_sum_over_its_layers_whatever_the_layout():
    net: Any = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    net = to_bayes(net, 1.0, -3.0)
    expected = sum(
        torch_kl(Normal(net[i].mean, F.softplus(net[i].rho)), Normal(0.0, 1.0)).sum()
        for i in (0, 2)
    )
    torch.testing.assert_close(kl_divergence(net), expected)
    torch.testing.assert_close(kl_divergence(net.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_joint_posterior_equals_the_results_of_the_layers(layout):
    net = nn.Sequential(
        bayes_conv(),
        nn.ReLU(),
        nn.Flatten(),
        BayesLinear.like(nn.Linear(24, 2), prior_std=0.2, init_rho=-2.0),
    ).to(memory_format=layout)
    conv, linear = net[0], net[3]
    parameters = list(net.parameters())
    x = torch.randn(3, 4, 4, 4).to(memory_format=layout)

    def draw() -> Tensor:
        torch.manual_seed(3)
        return net.train()(x)

    alone = draw()
    expected_kl = kl_divergence(conv) + kl_divergence(linear)
    expected = torch.autograd.grad(alone.square().sum() + expected_kl, parameters)
    with JointPosterior(net) as posterior:
        for layer in (conv, linear):
            assert layer.sigma.stride() == layer.mean.stride()
            torch.testing.assert_close(layer.sigma, F.softplus(layer.rho))
            torch.testing.assert_close(layer.variance, F.softplus(layer.rho).square())
        joint = draw()
    torch.testing.assert_close(joint, alone)
    torch.testing.assert_close(posterior.kl(), expected_kl)
    loss = joint.square().sum() + posterior.kl()
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected)


def test_layers_forget_a_joint_posterior_when_it_ends_even_by_an_error():
    layer = bayes_linear()
    with pytest.raises(RuntimeError), JointPosterior(layer):
        raise RuntimeError
    layer.set_sigma(torch.full_like(layer.mean, 0.5))
    torch.testing.assert_close(layer.sigma, torch.full_like(layer.mean, 0.5))


def test_kl_of_millions_of_weights_is_as_exact_as_float32_allows():
    layer = GaussianWeight(torch.randn(3000, 3000) * 0.05, None, prior_std=0.1, init_rho=-2.2)
    exact = kl_divergence(copy.deepcopy(layer).double())
    assert abs(kl_divergence(layer).double() / exact - 1) < 1e-5


def test_kl_of_a_network_without_gaussian_weights_is_a_type_error():
    with pytest.raises(TypeError, match="no Gaussian weights"):
        kl_divergence(nn.Linear(2, 2))


def test_sigma_is_softplus_to_the_last_digits_from_tiny_to_large():
    rho = torch.linspace(-60, 60, 4801)
    layer = GaussianWeight(rho, None, prior_std=1.0, init_rho=0.0)
    layer.rho = nn.Parameter(rho)
    # softplus(r) = max(r, 0) + log1p(exp(-|r|)) loses no digit in float64
    exact = rho.double().clamp_min(0) + torch.log1p(torch.exp(-rho.double().abs()))
    assert (layer.sigma.double() / exact - 1).abs().max() < 1e-6

    (gradient,) = torch.autograd.grad(layer.sigma.sum(), layer.rho)
    exact_gradient = 1 / (1 + torch.exp(-rho.double()))
    assert (gradient.double() / exact_gradient - 1).abs().max() < 1e-6


def test_gradients_of_sigma_variance_and_kl_pass_gradcheck():
    layer = bayes_linear(torch.float64)
    mean = layer.mean.detach().clone().requires_grad_()
    rho = torch.linspace(-12, 45, 15, dtype=torch.float64).view(3, 5).requires_grad_()

    def with_parameters(name: str):
        def function(mean: Tensor, rho: Tensor) -> Tensor:
            layer.__dict__.update(mean=mean, rho=rho)
            return kl_divergence(layer) if name == "kl" else getattr(layer, name)

        return function

    del layer.mean, layer.rho
    assert torch.autograd.gradcheck(with_parameters("sigma"), (mean, rho))
    assert torch.autograd.gradcheck(with_parameters("variance"), (mean, rho))
    rho = torch.linspace(-4, 4, 15, dtype=torch.float64).view(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(with_parameters("kl"), (mean, rho))


@pytest.mark.parametrize("sigma", [1e-8, 1e-4, 0.3, 1.0, 50.0])
def test_set_sigma_sets_sigma(sigma):
    layer = bayes_linear()
    wanted = sigma * torch.linspace(1, 2, 15).view(3, 5)
    layer.set_sigma(wanted)
    # rho is about log(sigma), whose last digit is worth |rho| * 6e-8 of sigma
    torch.testing.assert_close(layer.sigma, wanted, rtol=3e-6, atol=0)


@pytest.mark.parametrize(("layer", "shape"), layers_and_inputs())
def test_outputs_of_training_and_evaluation_have_the_exact_moments(layer, shape):
    torch.manual_seed(1)
    x = torch.randn(shape)
    sigma = F.softplus(layer.rho)
    with torch.no_grad():
        mean = plain_map(layer, x, layer.mean, layer.bias)
        variance = plain_map(layer, x.square(), sigma.square(), None)
        layer.train()
        # one call on many copies: each row has noise of its own
        many = x.repeat(2000, *[1] * (x.dim() - 1))
        assert_moments(layer(many).unflatten(0, (2000, -1)), mean, variance)
        layer.eval()
        assert_moments(torch.stack([layer(x) for _ in range(2000)]), mean, variance)


@pytest.mark.parametrize(("layer", "shape"), layers_and_inputs())
def test_gradients_of_a_training_draw_are_those_of_plain_autograd(layer, shape):
    torch.manual_seed(1)
    x = torch.randn(shape, requires_grad=True)
    inputs = [x, *layer.parameters()]
    layer.train()
    torch.manual_seed(2)
    out = layer(x)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, upstream)

    mean = plain_map(layer, x, layer.mean, layer.bias)
    variance = plain_map(layer, x.square(), F.softplus(layer.rho).square(), None)
    torch.manual_seed(2)
    naive = mean + variance.sqrt() * 2 * noise_like(mean, std=0.5)
    torch.testing.assert_close(out, naive)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(naive, inputs, upstream), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("layer", [bayes_linear(), bayes_conv()], ids=["linear", "conv"])
def test_an_input_of_zeros_gives_the_bias_and_no_gradient_to_sigma(layer):
    x = torch.zeros((2, 5) if isinstance(layer, BayesLinear) else (2, 4, 5, 5), requires_grad=True)
    out = layer.train()(x)
    bias = layer.bias if out.dim() == 2 else layer.bias[:, None, None]
    torch.testing.assert_close(out, bias.expand_as(out))
    by_x, by_mean, by_rho = torch.autograd.grad(out.sum(), [x, layer.mean, layer.rho])
    assert by_x.isfinite().all()
    assert by_mean.count_nonzero() == 0
    assert by_rho.count_nonzero() == 0


def test_a_variance_rounded_below_zero_counts_as_zero(monkeypatch):
    layer = bayes_linear()

    def rounded(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: None) -> Tensor:
        out = F.linear(x, weight, bias)
        return out if bias is not None else out * torch.tensor([1.0, 0.0, -1e-9])

    monkeypatch.setattr("bqnn.layers.bayes.linear_map", rounded)
    x = torch.ones(2, 5)
    out = layer.train()(x)
    expected = F.linear(x, layer.mean, layer.bias)
    assert (out[:, 0] != expected[:, 0]).all()
    torch.testing.assert_close(out[:, 1:], expected[:, 1:])
    (slope,) = torch.autograd.grad(out[:, 1:].sum(), layer.rho, retain_graph=True)
    assert not slope.any()
    assert torch.autograd.grad(out[:, 0].sum(), layer.rho)[0][0].all()


@pytest.mark.parametrize(("in_channels", "kernel_size"), [(1, 3), (4, 3), (4, 1), (1, 1)])
def test_both_memory_layouts_give_the_same_moments_and_one_layout_of_outputs(
    in_channels, kernel_size, monkeypatch
):
    torch.manual_seed(1)
    x = torch.randn(1, in_channels, 6, 5)
    plain = nn.Conv2d(in_channels, 6, kernel_size)
    layer = BayesConv2d.like(plain, prior_std=0.7, init_rho=-1.0).train()
    strides = []

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        strides.append(weight.stride())
        return linear_map(x, weight, bias, geometry)

    monkeypatch.setattr("bqnn.layers.bayes.linear_map", watched)
    with torch.no_grad():
        mean = F.conv2d(x, layer.mean, layer.bias)
        variance = F.conv2d(x.square(), F.softplus(layer.rho).square())
        for layout in (torch.contiguous_format, torch.channels_last):
            layer.to(memory_format=layout)
            many = x.repeat(4000, 1, 1, 1).to(memory_format=layout)
            out = layer(many)
            assert out.is_contiguous(memory_format=layout)
            assert_moments(out, mean[0], variance[0])
            assert strides.pop() == strides.pop() == layer.mean.stride()


@pytest.mark.parametrize("layer", [bayes_linear(), bayes_conv()], ids=["linear", "conv"])
def test_bfloat16_autocast_draws_and_learns_close_to_float32(layer):
    torch.manual_seed(1)
    x = torch.randn((512, 5) if isinstance(layer, BayesLinear) else (512, 4, 3, 3))
    layer.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    variance = plain_map(layer, x.square(), F.softplus(layer.rho).square(), None)
    scores = (out - plain_map(layer, x, layer.mean, layer.bias)) / variance.sqrt()
    # 5 standard errors of a variance from n draws, and 2 % for eight bits of precision
    assert abs(scores.var() - 1) < 5 * math.sqrt(2 / scores.numel()) + 0.02
    for gradient in torch.autograd.grad(out.float().square().sum(), list(layer.parameters())):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        assert gradient.count_nonzero() == gradient.numel()


def test_conversion_keeps_weights_biases_and_geometry():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Flatten(), nn.Linear(16, 3)
    )
    x = torch.randn(5, 2, 4, 4)
    expected = net(x)
    to_bayes(net, prior_std=1.0, init_rho=-60.0)  # a sigma of 1e-26 draws nothing but the mean
    assert isinstance(net[0], BayesConv2d)
    assert isinstance(net[2], BayesLinear)
    torch.testing.assert_close(net.eval()(x), expected)
    torch.testing.assert_close(net.train()(x), expected)


@pytest.mark.parametrize(
    ("padding", "options"),
    [("same", {"dilation": 2}), ("valid", {"stride": 2, "groups": 2}), ((2, 0), {})],
)
def test_the_geometry_of_a_convolution_says_all_but_its_weights(padding, options):
    layer = nn.Conv2d(2, 4, (3, 5), padding=padding, **options)
    x = torch.randn(2, 2, 9, 9)
    assert torch.equal(linear_map(x, layer.weight, layer.bias, Geometry.of(layer)), layer(x))


def test_a_geometry_that_pads_one_side_more_is_refused():
    with pytest.raises(TypeError, match=r"padding='same' at kernel_size=\(2, 2\).*odd kernel_size"):
        Geometry.of(nn.Conv2d(1, 1, 2, padding="same"))


def test_conversion_refuses_unsupported_modules():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    to_bayes(net, 1.0, -5.0)
    with pytest.raises(TypeError, match="0 is a BayesLinear"):
        to_bayes(net, 1.0, -5.0)
    with pytest.raises(ValueError, match="no Linear or Conv2d"):
        to_bayes(nn.Sequential(nn.ReLU()), 1.0, -5.0)
    with pytest.raises(TypeError, match="padding_mode='reflect'"):
        to_bayes(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")), 1.0, -5.0)
    with pytest.raises(ValueError, match="prior_std=0"):
        to_bayes(nn.Sequential(nn.Linear(2, 2)), 0.0, -5.0)


@pytest.mark.parametrize(
    ("args", "options"),
    [((4, 6), {}), ((4, 6, False), {}), ((4,), {"out_features": 6, "dtype": torch.float64})],
)
def test_a_bayesian_linear_layer_takes_the_arguments_of_torch(args, options):
    torch.manual_seed(0)
    layer = nn.Linear(*args, **options)
    torch.manual_seed(0)
    made = BayesLinear(*args, **options, prior_std=0.5, init_rho=-3.0)
    assert torch.equal(made.mean, layer.weight)
    assert (made.bias is None) is (layer.bias is None)
    assert made.prior_std == 0.5
    assert made.rho.unique().tolist() == [-3.0]


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((4, 6, 3), {}),
        ((4, 6, (3, 5), 2, 1), {"groups": 2, "bias": False}),
        ((4, 6), {"kernel_size": 3, "padding": "same", "dilation": 2, "padding_mode": "zeros"}),
        ((4, 6, 3, 1, 1, 1, 1, True, "zeros"), {}),
    ],
)
def test_a_bayesian_convolution_takes_the_arguments_of_torch(args, options):
    torch.manual_seed(0)
    layer = nn.Conv2d(*args, **options)
    torch.manual_seed(0)
    made = BayesConv2d(*args, **options, init_rho=-60.0).eval()
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(made(x), layer(x))


def test_a_bayesian_layer_refuses_what_its_like_refuses():
    with pytest.raises(TypeError, match="padding_mode='reflect'"):
        BayesConv2d(1, 1, 3, padding_mode="reflect")
    with pytest.raises(ValueError, match="prior_std=0"):
        BayesLinear(1, 1, prior_std=0)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_linear_layers_take_any_leading_dimensions(shape, training):
    layer = bayes_linear().train(training)
    x = torch.randn(shape)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    assert torch.equal(out, layer(x.reshape(-1, 5)).reshape(*shape[:-1], 3))
    out.sum().backward()
    assert layer.rho.grad is not None


def test_kept_types_stay_point_valued():
    net = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 2), nn.BatchNorm1d(2))
    with pytest.raises(TypeError, match=r"0 is an Embedding.*; keep=\(nn.Embedding,\) leaves"):
        to_bayes(net)
    to_bayes(net, keep=(nn.Embedding, nn.LayerNorm))
    assert [type(module) for module in net] == [
        nn.Embedding,
        nn.LayerNorm,
        BayesLinear,
        nn.BatchNorm1d,
    ]
    with pytest.raises(TypeError, match="keep="):
        to_bayes(nn.Sequential(nn.Linear(2, 2)), keep=("0",))


def test_modules_of_torch_that_read_their_layers_are_kept_whole():
    def net() -> nn.Module:
        encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
        return nn.Sequential(encoder, nn.Linear(8, 2)).eval()

    keep: Any = (nn.MultiheadAttention, nn.LayerNorm)
    with pytest.raises(TypeError, match=r"0\.linear1 is a part of a TransformerEncoderLayer"):
        to_bayes(net(), keep=keep)
    made = to_bayes(net(), keep=nn.TransformerEncoderLayer)
    assert [name for name, m in made.named_modules() if isinstance(m, GaussianWeight)] == ["1"]
    assert made(torch.randn(2, 3, 8)).shape == (2, 3, 2)


def test_layers_have_the_sizes_of_the_layers_of_torch():
    linear, conv = nn.Linear(3, 2), nn.Conv2d(4, 6, (3, 5), 2, (1, 2), (2, 1), groups=2)
    for name in ("in_features", "out_features"):
        assert getattr(BayesLinear.like(linear), name) == getattr(linear, name)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(BayesConv2d.like(conv), name) == getattr(conv, name)
    assert BayesConv2d.like(conv).groups == conv.groups


def test_own_parameters_of_a_network_are_named_with_the_remedy():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.position = nn.Linear(3, 2), nn.Parameter(torch.zeros(3))

    message = r"keep=\(Net,\) leaves its own parameters \(position\) as they are, and converts the"
    for net in (Net(), nn.Sequential(Net())):
        with pytest.raises(TypeError, match=message):
            to_bayes(net)
        to_bayes(net, keep=(Net,))
    with pytest.raises(
        TypeError, match=r"keep=\(nn.Embedding,\) leaves its own parameters .weight"
    ):
        to_bayes(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 1)))


def test_a_bayesian_network_is_not_converted_again():
    net = to_bayes(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(TypeError, match="0 is a BayesLinear already; convert a network once"):
        to_bayes(net)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [bayes_linear, bayes_conv])
def test_held_means_are_the_weights_in_both_modes(make, training):
    layer = make().train(training)
    x = torch.randn(2, 5) if layer.geometry is None else torch.randn(2, 4, 6, 6)
    with held_means(nn.Sequential(layer)):
        out = layer(x)
    torch.testing.assert_close(out, linear_map(x, layer.mean, layer.bias, layer.geometry))
    out.sum().backward()
    assert layer.mean.grad is not None
    assert layer.rho.grad is None
    assert not torch.equal(layer(x), layer(x))
