"""Linear and convolutional layers whose weights have a Gaussian posterior."""

import math
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bqnn.layers.draws import DrawnWeights
from bqnn.layers.noise import noise_like
from bqnn.layers.swap import swap


class GaussianWeight(DrawnWeights):
    """A layer with weights w ~ N(mean, sigma^2), sigma = softplus(rho), and a point bias.

    In training the output is drawn, by local reparametrization (Kingma et al., 2015, eq. 6):
    for a layer f that is linear in its weights,

        f(x; mean) + sqrt(f(x^2; sigma^2)) * eps,    eps ~ N(0, 1) for every output.

    In evaluation the weights are drawn (Blundell et al., 2015), one draw per call, or one for
    all calls while a draw is held. The prior is N(0, prior_std^2).
    """

    mean: nn.Parameter
    rho: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, prior_std: float, init_rho: float
    ) -> None:
        super().__init__()
        if not 0 < prior_std < math.inf:
            raise ValueError(f"method.prior_std={prior_std}: a standard deviation is positive")
        if not -80 <= init_rho <= 80:
            raise ValueError(
                f"method.init_rho={init_rho}: sigma = softplus(rho) leaves the range of floats; "
                "choose -80 to 80, -5 is usual"
            )
        self.mean = nn.Parameter(weight.detach().clone())
        self.rho = nn.Parameter(torch.full_like(self.mean, init_rho))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.prior_std = prior_std

    @property
    def sigma(self) -> Tensor:
        """The posterior's standard deviation, shaped like the weights."""
        return _Softplus.apply(self.rho)

    @torch.no_grad()
    def set_sigma(self, sigma: Tensor) -> None:
        """Make `sigma`, positive and shaped like the weights, the standard deviation."""
        if not (sigma > 0).all():
            raise ValueError("set_sigma: a standard deviation is positive")
        self.rho.copy_(sigma + torch.log(-torch.expm1(-sigma)))

    @property
    def variance(self) -> Tensor:
        """sigma^2, the posterior's variance."""
        return _SoftplusSquared.apply(self.rho)

    def draw(self) -> Tensor:
        """One draw of the weights."""
        return torch.addcmul(self.mean, self.sigma, noise_like(self.mean))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.apply_weight(x, self.weights())
        mean = self.apply_weight(x, self.mean)
        variance = self.apply_weight(x.square(), self.variance, with_bias=False)
        return local_reparametrization(mean, variance)

    def apply_weight(self, x: Tensor, weight: Tensor, with_bias: bool = True) -> Tensor:
        """The layer's linear map of `x` at these weights."""
        raise NotImplementedError


class BayesLinear(GaussianWeight):
    """nn.Linear with Gaussian weights: [B, in_features] -> [B, out_features]."""

    @classmethod
    def like(cls, layer: nn.Linear, *, prior_std: float, init_rho: float) -> Self:
        """A Bayesian version of `layer`, with its weights as means and its bias."""
        return cls(layer.weight, layer.bias, prior_std=prior_std, init_rho=init_rho)

    def apply_weight(self, x: Tensor, weight: Tensor, with_bias: bool = True) -> Tensor:
        if x.dim() != 2:
            raise ValueError(
                f"BayesLinear: inputs {tuple(x.shape)}; flatten them to two dimensions"
            )
        return F.linear(x, weight, self.bias if with_bias else None)

    def extra_repr(self) -> str:
        return f"{self.mean.shape[1]}, {self.mean.shape[0]}, prior_std={self.prior_std}"


class BayesConv2d(GaussianWeight):
    """nn.Conv2d with Gaussian weights: [B, C, H, W] -> [B, C', H', W']."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        prior_std: float,
        init_rho: float,
        geometry: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(weight, bias, prior_std=prior_std, init_rho=init_rho)
        self.geometry = geometry or {}  # stride, padding, dilation, groups

    @classmethod
    def like(cls, layer: nn.Conv2d, *, prior_std: float, init_rho: float) -> Self:
        """A Bayesian version of `layer`, with its weights as means, its bias and geometry."""
        if layer.padding_mode != "zeros":
            raise TypeError(f"padding_mode={layer.padding_mode!r}: only 'zeros' can be Bayesian")
        geometry = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
        }
        return cls(
            layer.weight, layer.bias, prior_std=prior_std, init_rho=init_rho, geometry=geometry
        )

    def apply_weight(self, x: Tensor, weight: Tensor, with_bias: bool = True) -> Tensor:
        if self.mean.stride(1) == 1:
            # Arithmetic on a weight with one input channel forgets that it was channels_last,
            # and a convolution goes by its weight: the two outputs would differ in layout.
            weight = weight.to(memory_format=torch.channels_last)
        return F.conv2d(x, weight, self.bias if with_bias else None, **self.geometry)

    def extra_repr(self) -> str:
        geometry = ", ".join(f"{key}={value}" for key, value in self.geometry.items())
        return f"{tuple(self.mean.shape)}, {geometry}, prior_std={self.prior_std}"


def to_bayes(net: nn.Module, prior_std: float, init_rho: float) -> nn.Module:
    """Give every linear and convolution of a network Gaussian weights, in place."""
    count = swap(
        net,
        {
            nn.Linear: partial(BayesLinear.like, prior_std=prior_std, init_rho=init_rho),
            nn.Conv2d: partial(BayesConv2d.like, prior_std=prior_std, init_rho=init_rho),
        },
        keep=(nn.BatchNorm2d,),
    )
    if count == 0:
        raise ValueError("to_bayes: no Linear or Conv2d left to convert")
    return net


def kl_divergence(net: nn.Module) -> Tensor:
    """KL(posterior || prior) in nats, in closed form, summed over all weights of a network."""
    layers = [module for module in net.modules() if isinstance(module, GaussianWeight)]
    if not layers:
        raise TypeError("kl_divergence: this network has no Gaussian weights")
    parameters = [parameter for layer in layers for parameter in (layer.mean, layer.rho)]
    kl: Tensor = _GaussianKL.apply([layer.prior_std for layer in layers], *parameters)
    return kl


def local_reparametrization(mean: Tensor, variance: Tensor) -> Tensor:
    """A draw of N(mean, variance) for every output; both tensors are used up."""
    out, _ = _GaussianDraw.apply(mean, variance, noise_like(mean, std=0.5))
    return out


class _GaussianDraw(torch.autograd.Function):
    """mean + sqrt(variance) * eps, written over all three: new memory costs more than the sums.

    eps has a standard deviation of 1/2. Where all inputs of an output are zero (the black
    border of a picture) its variance is zero, and fast convolutions round some to below zero:
    there the square root gets a floor, and no slope.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        is_floored = variance <= 1e-30
        std = variance.clamp_min_(1e-30).sqrt_()
        out = mean.addcmul_(std, eps, value=2)
        # The slope of the output by the variance.
        ctx.save_for_backward(eps.div_(std).masked_fill_(is_floored, 0))
        ctx.mark_dirty(mean, variance)
        ctx.mark_non_differentiable(std)
        return out, std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad, grad * slope, None


def softplus(rho: Tensor) -> Tensor:
    """log(1 + exp(rho)), accurate to the last digits for any rho; autograd knows nothing of it.

    torch's own takes its logarithm from log1p, which is ten times as slow as log on the CPU:
    measured, 7.6 ms for 1.2 million numbers. With u = 1 + x rounded, log1p(x) is
    log(u) x / (u - 1), since both roundings cancel (Kahan).
    """
    x = rho.clamp(max=40).exp_()
    u = x + 1
    small = torch.where(u == 1, x, u.log().mul_(x).div_(u - 1))
    return torch.where(rho > 40, rho, small)


# Each of these is one node of the graph: on small networks nodes cost more than their arithmetic.


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rho: Tensor) -> Tensor:
        ctx.save_for_backward(rho)
        return softplus(rho)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rho,) = ctx.saved_tensors
        return grad * rho.sigmoid()


class _SoftplusSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rho: Tensor) -> Tensor:
        sigma = softplus(rho)
        ctx.save_for_backward(rho, sigma)
        return sigma.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        rho, sigma = ctx.saved_tensors
        return (sigma * 2).mul_(grad).mul_(rho.sigmoid())


class _GaussianKL(torch.autograd.Function):
    """The sum of log(prior_std / sigma) + (sigma^2 + mean^2) / (2 prior_std^2) - 1/2.

    Of one prior_std per layer, and each layer's mean and rho in turn.
    """

    @staticmethod
    def forward(ctx: Any, prior_stds: list[float], *parameters: Tensor) -> Tensor:
        means, rhos = parameters[::2], parameters[1::2]
        sigmas = [softplus(rho) for rho in rhos]
        ctx.save_for_backward(*means, *rhos, *sigmas)
        ctx.prior_stds = prior_stds
        terms = []
        for prior_std, mean, sigma in zip(prior_stds, means, sigmas, strict=True):
            squares = sigma.square().sum() + mean.square().sum()
            constant = mean.numel() * (math.log(prior_std) - 0.5)
            terms.append(squares / (2 * prior_std**2) - sigma.log().sum() + constant)
        return torch.stack(terms).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        number = len(ctx.prior_stds)
        saved = ctx.saved_tensors
        layers = zip(
            ctx.prior_stds,
            saved[:number],
            saved[number : 2 * number],
            saved[2 * number :],
            strict=True,
        )
        gradients: list[Tensor | None] = [None]
        for prior_std, mean, rho, sigma in layers:
            scale = grad / prior_std**2
            by_sigma = (sigma * scale).sub_(grad / sigma)
            gradients += [mean * scale, by_sigma.mul_(rho.sigmoid())]
        return tuple(gradients)
