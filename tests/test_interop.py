"""Layers of other libraries keep their posterior, and lossy conversions are refused.

Each test runs with stand-ins that have the attributes of the libraries' layers, and with the
libraries themselves if they are installed.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bqnn.interop import from_bayesian_torch, from_torch_uncertainty
from bqnn.layers.bayes import BayesConv2d, BayesLinear, kl_divergence


class Variational(nn.Module):
    """A stand-in for the layers of bayesian-torch."""

    names = ("mu_weight", "rho_weight")

    def __init__(
        self, shape: tuple[int, ...], bias: bool, prior_mean: float, prior_variance: float
    ) -> None:
        super().__init__()
        self.dnn_to_bnn_flag = False
        self.bias = bias
        for name, start in zip(self.names, (0.0, -3.0), strict=True):
            setattr(self, name, nn.Parameter(start + 0.1 * torch.randn(shape)))
        self.register_parameter("mu_bias", nn.Parameter(torch.randn(shape[0])) if bias else None)
        self.register_parameter("rho_bias", nn.Parameter(torch.randn(shape[0])) if bias else None)
        self.register_buffer("prior_weight_mu", torch.full(shape, float(prior_mean)))
        self.register_buffer("prior_weight_sigma", torch.full(shape, float(prior_variance)))

    def forward(self, x: Tensor) -> Any:
        mean, rho = (getattr(self, name) for name in self.names)
        weight = mean + torch.log1p(torch.exp(rho)) * torch.randn_like(mean)
        out = self.apply_weight(x, weight)
        return out if self.dnn_to_bnn_flag else (out, torch.zeros(()))

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.mu_bias)


class VariationalLinear(Variational):
    def __init__(
        self, inputs: int, outputs: int, prior_mean=0.0, prior_variance=1.0, bias=True
    ) -> None:
        super().__init__((outputs, inputs), bias, prior_mean, prior_variance)


class VariationalConv(Variational):
    names = ("mu_kernel", "rho_kernel")

    def __init__(
        self, inputs: int, outputs: int, kernel_size: int, stride=1, padding=0, dilation=1,
        groups=1, prior_mean=0.0, prior_variance=1.0, bias=True,
    ) -> None:  # fmt: skip
        shape = (outputs, inputs // groups, kernel_size, kernel_size)
        super().__init__(shape, bias, prior_mean, prior_variance)
        self.in_channels, self.out_channels = inputs, outputs
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(x, weight, self.mu_bias, *geometry)


class Sampled(nn.Module):
    """A stand-in for the layers of torch-uncertainty."""

    def __init__(
        self, shape: tuple[int, ...], bias: bool, stds: tuple[float, float], share: float
    ) -> None:
        super().__init__()
        self.prior_sigma_1, self.prior_sigma_2 = stds
        self.prior_pi, self.frozen = share, False
        self.weight_mu = nn.Parameter(0.1 * torch.randn(shape))
        self.weight_sigma = nn.Parameter(0.1 * torch.randn(shape) - 7)
        for name in ("bias_mu", "bias_sigma"):
            value = nn.Parameter(torch.randn(shape[0])) if bias else None
            self.register_parameter(name, value)

    def freeze(self) -> None:
        self.frozen = True


class SampledLinear(Sampled):
    def __init__(
        self, inputs: int, outputs: int, prior_sigma_1=0.1, prior_sigma_2=0.4, prior_pi=1.0,
        bias=True,
    ) -> None:  # fmt: skip
        super().__init__((outputs, inputs), bias, (prior_sigma_1, prior_sigma_2), prior_pi)


class SampledConv(Sampled):
    def __init__(
        self, inputs: int, outputs: int, kernel_size: int, stride=1, padding=0, dilation=1,
        groups=1, bias=True, padding_mode="zeros",
    ) -> None:  # fmt: skip
        shape = (outputs, inputs // groups, kernel_size, kernel_size)
        super().__init__(shape, bias, (0.1, 0.4), 1.0)
        self.in_channels, self.out_channels, self.padding_mode = inputs, outputs, padding_mode
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups


STAND_INS: dict[str, dict[str, Any]] = {
    "bayesian_torch.layers": {
        "LinearReparameterization": VariationalLinear,
        "LinearFlipout": type("LinearFlipout", (VariationalLinear,), {}),
        "Conv2dReparameterization": VariationalConv,
        "Conv2dFlipout": type("Conv2dFlipout", (VariationalConv,), {}),
        "Conv1dReparameterization": type("Conv1dReparameterization", (Variational,), {}),
    },
    "bayesian_torch.layers.base_variational_layer": {"BaseVariationalLayer_": Variational},
    "torch_uncertainty.layers.bayesian": {
        "BayesLinear": SampledLinear,
        "BayesConv2d": SampledConv,
        "bayesian_modules": (SampledLinear, SampledConv, Sampled),
    },
}


def library(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the layers of a library, or of its stand-ins."""
    if kind == "installed":
        try:
            return importlib.import_module(name)
        except Exception as error:  # an installed library may not suit the version of torch
            pytest.skip(f"{name} cannot be imported: {error}")
    for path, contents in STAND_INS.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            own = ".".join(parts[:end])
            if own not in STAND_INS or own == path:
                monkeypatch.setitem(sys.modules, own, ModuleType(own))
        vars(sys.modules[path]).update(contents)
    for path in ("bayesian_torch", "torch_uncertainty.layers"):
        for child in STAND_INS:
            if child.rpartition(".")[0] == path:
                setattr(sys.modules[path], child.rpartition(".")[2], sys.modules[child])
    return SimpleNamespace(**STAND_INS[name])


@pytest.fixture(params=["stand-in", "installed"])
def bayesian_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return library("bayesian_torch.layers", request.param, monkeypatch)


@pytest.fixture(params=["stand-in", "installed"])
def torch_uncertainty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return library("torch_uncertainty.layers.bayesian", request.param, monkeypatch)


def flagged(layer: Any) -> Any:
    layer.dnn_to_bnn_flag = True
    return layer


def sigma(rho: Tensor) -> Tensor:
    return torch.log1p(torch.exp(rho))


# ---- bayesian-torch


@pytest.mark.parametrize("kind", ["LinearReparameterization", "LinearFlipout"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_of_bayesian_torch_keep_their_posterior(kind, bias, bayesian_torch, caplog):
    torch.manual_seed(0)
    layer = flagged(getattr(bayesian_torch, kind)(3, 2, prior_variance=0.5, bias=bias))
    net = nn.Sequential(layer, nn.LayerNorm(2)).eval()
    with caplog.at_level("WARNING", logger="bqnn"):
        assert from_bayesian_torch(net) is net
    assert ("1 Gaussian biases became their means" in caplog.text) == bias
    assert type(net[0]) is BayesLinear
    assert not net[0].training
    assert net[0].prior_std == 0.5  # the library uses its prior_variance as a standard deviation
    assert torch.equal(net[0].mean, layer.mu_weight)
    torch.testing.assert_close(net[0].sigma, sigma(layer.rho_weight))
    assert (net[0].bias is None) != bias
    if bias:
        assert torch.equal(net[0].bias, layer.mu_bias)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(layer.mu_weight, sigma(layer.rho_weight)),
        torch.distributions.Normal(0.0, 0.5),
    ).sum()
    torch.testing.assert_close(kl_divergence(net), expected)


@pytest.mark.parametrize("kind", ["Conv2dReparameterization", "Conv2dFlipout"])
def test_convolutions_of_bayesian_torch_keep_their_posterior_and_geometry(kind, bayesian_torch):
    torch.manual_seed(0)
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2, "bias": False}
    layer = flagged(getattr(bayesian_torch, kind)(2, 4, 3, **options))
    nn.init.constant_(layer.rho_kernel, -60.0)  # so that a draw is the mean
    net = nn.ModuleDict({"conv": layer})
    x = torch.randn(2, 2, 9, 9)
    expected = layer(x)
    conv = from_bayesian_torch(net)["conv"]
    assert type(conv) is BayesConv2d
    for mode in (True, False):
        torch.testing.assert_close(conv.train(mode)(x), expected)


def test_draws_of_both_have_the_same_moments(bayesian_torch):
    torch.manual_seed(0)
    layer = flagged(bayesian_torch.LinearReparameterization(3, 2, bias=False))
    x = torch.ones(1, 3)
    other = torch.stack([layer(x) for _ in range(4000)]).squeeze()
    own_layer = from_bayesian_torch(layer).eval()
    own = torch.stack([own_layer(x) for _ in range(4000)]).squeeze()
    assert (own.mean(0) - other.mean(0)).abs().max() < 0.02
    assert (own.std(0) / other.std(0) - 1).abs().max() < 0.08


def test_layers_that_return_tuples_are_refused_and_nothing_changes(bayesian_torch):
    first = flagged(bayesian_torch.LinearReparameterization(3, 2))
    second = bayesian_torch.LinearReparameterization(3, 2)
    net = nn.Sequential(first, second)
    with pytest.raises(TypeError, match=r"^1 is a .* tuple .* set dnn_to_bnn_flag = True on each"):
        from_bayesian_torch(net)
    assert list(net) == [first, second]


def test_a_layer_in_two_places_stays_one(bayesian_torch):
    layer = flagged(bayesian_torch.LinearReparameterization(2, 2))
    layer.mu_weight.requires_grad_(False)
    net = from_bayesian_torch(nn.Sequential(layer, nn.Sequential(layer)))
    assert net[0] is net[1][0]
    assert not net[0].mean.requires_grad
    assert net[0].rho.requires_grad


def test_other_priors_need_an_answer(bayesian_torch):
    def make() -> nn.Module:
        return flagged(bayesian_torch.LinearReparameterization(3, 2, prior_mean=0.5))

    with pytest.raises(
        ValueError, match=r"^the network has a prior .* mean is not 0; give prior_s"
    ):
        from_bayesian_torch(make())
    assert from_bayesian_torch(make(), prior_std=2.0).prior_std == 2
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"^prior_std={wrong}"):
            from_bayesian_torch(make(), prior_std=wrong)


def test_unsupported_layers_are_refused_by_name(bayesian_torch):
    kind = type("MyLinear", (bayesian_torch.LinearReparameterization,), {})
    with pytest.raises(
        TypeError, match=r"^0 is a MyLinear, which from_bayesian_torch does not sup"
    ):
        from_bayesian_torch(nn.Sequential(flagged(kind(3, 2))))
    with pytest.raises(
        ValueError, match=r"^from_bayesian_torch: the network has no layer to conve"
    ):
        from_bayesian_torch(nn.Sequential(nn.Linear(3, 2)))
    layer = flagged(bayesian_torch.LinearReparameterization(3, 2))
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"^0 has forward hooks"):
        from_bayesian_torch(nn.Sequential(layer))


# ---- torch-uncertainty


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_torch_uncertainty_keep_their_posterior(bias, torch_uncertainty, caplog):
    torch.manual_seed(0)
    linear = torch_uncertainty.BayesLinear(3, 2, prior_sigma_1=0.3, bias=bias)
    conv = torch_uncertainty.BayesConv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=bias)
    net = nn.ModuleDict({"linear": linear, "norm": nn.LayerNorm(2), "conv": conv})
    with caplog.at_level("WARNING", logger="bqnn"):
        from_torch_uncertainty(net)
    assert ("2 Gaussian biases became their means" in caplog.text) == bias
    for made, source in ((net["linear"], linear), (net["conv"], conv)):
        assert torch.equal(made.mean, source.weight_mu)
        torch.testing.assert_close(made.sigma, sigma(source.weight_sigma))
        assert bias == (made.bias is not None)
        if bias:
            assert torch.equal(made.bias, source.bias_mu)
    assert net["linear"].prior_std == 0.3
    x = torch.randn(2, 2, 9, 9)
    out = F.conv2d(x, net["conv"].mean, net["conv"].bias, 2, 1, 1, 2)
    net["conv"].set_sigma(torch.full_like(net["conv"].mean, 1e-12))
    torch.testing.assert_close(net["conv"].eval()(x), out)


def test_a_mixture_as_a_prior_needs_an_answer(torch_uncertainty):
    make: Callable[[], nn.Module] = lambda: torch_uncertainty.BayesLinear(3, 2, prior_pi=0.5)  # noqa: E731
    with pytest.raises(ValueError, match=r"mixture .* standard deviation 0\.2915; give prior_std"):
        from_torch_uncertainty(make())
    assert from_torch_uncertainty(make(), prior_std=0.29).prior_std == 0.29


def test_frozen_layers_and_unknown_paddings_are_refused(torch_uncertainty):
    layer = torch_uncertainty.BayesLinear(3, 2)
    layer.freeze()
    with pytest.raises(TypeError, match=r"^0 is a .* that is frozen.* call unfreeze\(\)"):
        from_torch_uncertainty(nn.Sequential(layer))
    conv = torch_uncertainty.BayesConv2d(2, 2, 3, padding=(1, 1), padding_mode="reflect")
    with pytest.raises(TypeError, match=r"^0: padding_mode='reflect': cannot be converted"):
        from_torch_uncertainty(nn.Sequential(conv))
