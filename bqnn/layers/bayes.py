"""Linear and convolutional layers whose weights have a Gaussian posterior."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bqnn.arguments import real_number
from bqnn.layers.draws import DrawnWeights, evaluation_noise
from bqnn.layers.linear_map import Geometry, linear_map, linear_map_gradients
from bqnn.layers.noise import in_memory_order, noise_like
from bqnn.layers.swap import swap

Moments = tuple[Tensor, Tensor]  # sigma and its square, flat, in the order of memory


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
    geometry: Geometry | None = None  # of a convolution

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, prior_std: float, init_rho: float
    ) -> None:
        super().__init__()
        self.prior_std, init_rho = _checked(prior_std, init_rho)
        self.mean = nn.Parameter(weight.detach().clone())
        self.rho = nn.Parameter(torch.full_like(self.mean, init_rho))
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach().clone())
        )

    @property
    def sigma(self) -> Tensor:
        """The posterior's standard deviation, shaped like the weights."""
        return self._from_joint(0)

    @torch.no_grad()
    def set_sigma(self, sigma: Tensor) -> None:
        """Set the standard deviation to `sigma`, positive and shaped like the weights."""
        if not (sigma > 0).all():
            raise ValueError("set_sigma: a standard deviation is positive")
        self.rho.copy_(sigma + torch.log(-torch.expm1(-sigma)))

    @property
    def variance(self) -> Tensor:
        """sigma^2, the posterior's variance."""
        return self._from_joint(1)

    def _from_joint(self, index: int) -> Tensor:
        computed = _joint_moments.get()
        joint = None if computed is None else computed.get(self)
        if joint is None:
            (joint,), _ = _moments_and_kl(self.prior_std, [self])
        return _shaped_like(self.rho, joint[index])

    def frozen_as(self, layer: nn.Linear | nn.Conv2d) -> Self:
        """Freeze the parameters that are frozen in `layer`, and return the module."""
        for own, source in ((self.mean, layer.weight), (self.rho, layer.weight)):
            own.requires_grad_(source.requires_grad)
        if self.bias is not None and layer.bias is not None:
            self.bias.requires_grad_(layer.bias.requires_grad)
        return self

    def draw(self) -> Tensor:
        """One draw of the weights."""
        return torch.addcmul(self.mean, self.sigma, evaluation_noise(self.mean))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return linear_map(x, self.weights(), self.bias, self.geometry)
        return local_reparametrization(x, self.mean, self.variance, self.bias, self.geometry)


class BayesLinear(GaussianWeight):
    """nn.Linear with Gaussian weights: [B, in_features] -> [B, out_features]."""

    @classmethod
    def like(cls, layer: nn.Linear, *, prior_std: float, init_rho: float) -> Self:
        """A Bayesian version of `layer`, with its weights as means and its bias."""
        made = cls(layer.weight, layer.bias, prior_std=prior_std, init_rho=init_rho)
        return made.frozen_as(layer)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(
                f"BayesLinear: inputs {tuple(x.shape)}; flatten them to two dimensions"
            )
        return super().forward(x)

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
        geometry: Geometry,
    ) -> None:
        super().__init__(weight, bias, prior_std=prior_std, init_rho=init_rho)
        self.geometry: Geometry = geometry

    @classmethod
    def like(cls, layer: nn.Conv2d, *, prior_std: float, init_rho: float) -> Self:
        """A Bayesian version of `layer`, with its weights as means, its bias and geometry."""
        made = cls(
            layer.weight,
            layer.bias,
            prior_std=prior_std,
            init_rho=init_rho,
            geometry=Geometry.of(layer),
        )
        return made.frozen_as(layer)

    def extra_repr(self) -> str:
        geometry = ", ".join(f"{key}={value}" for key, value in self.geometry._asdict().items())
        return f"{tuple(self.mean.shape)}, {geometry}, prior_std={self.prior_std}"


def to_bayes(net: nn.Module, prior_std: float, init_rho: float) -> nn.Module:
    """Give every linear and convolution of a network Gaussian weights, in place."""
    prior_std, init_rho = _checked(prior_std, init_rho)
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


def _checked(prior_std: float, init_rho: float) -> tuple[float, float]:
    reason = "a standard deviation is positive and finite; 1 is usual"
    prior_std = real_number("prior_std", prior_std, reason, 0, without=(0,))
    reason = "of sigma = softplus(rho), which must stay in the range of floats; choose -80 to 80"
    return prior_std, real_number("init_rho", init_rho, f"{reason}, -5 is usual", -80, 80)


# What this thread has computed jointly, while it uses that.
_joint_moments: ContextVar[dict[GaussianWeight, Moments] | None] = ContextVar(
    "joint moments", default=None
)


class JointPosterior:
    """The Gaussian weights of a network, with sigma computed by one softplus over all of them.

    In a `with` statement the layers use it, each time that they need sigma or its square in this
    thread, and compute none of their own. On small networks this halves what a posterior costs in
    a step; inside of a function that torch.compile traces, they go on computing their own, which
    it fuses. Gradients of all means and rhos come together, at the end of the backward pass.
    """

    def __init__(self, net: nn.Module) -> None:
        by_prior: defaultdict[float, list[GaussianWeight]] = defaultdict(list)
        for module in net.modules():
            if isinstance(module, GaussianWeight):
                by_prior[module.prior_std].append(module)
        self._moments: dict[GaussianWeight, Moments] = {}
        self._kls: list[Tensor] = []
        for prior_std, layers in by_prior.items():
            moments, kl = _moments_and_kl(prior_std, layers)
            self._moments.update(zip(layers, moments, strict=True))
            self._kls.append(kl)

    def __enter__(self) -> Self:
        if not torch.compiler.is_compiling():  # it cannot trace this
            self._token = _joint_moments.set({**(_joint_moments.get() or {}), **self._moments})
        return self

    def __exit__(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            _joint_moments.reset(self._token)

    def kl(self) -> Tensor:
        """`kl_divergence` of the network."""
        if not self._kls:
            raise TypeError("kl_divergence: this network has no Gaussian weights")
        return torch.stack(self._kls).sum()


def _moments_and_kl(prior_std: float, layers: list[GaussianWeight]) -> tuple[list[Moments], Tensor]:
    """sigma and its square for each layer, flat, and the KL of all these layers."""
    parameters = [layer.mean for layer in layers] + [layer.rho for layer in layers]
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        sigma, variance, kl = _Posterior.apply(prior_std, *parameters)
    else:  # torch.compile loses the parameters of a Function that needs no gradient
        _, _, sigma, variance, kl = _posterior(prior_std, parameters)
    sizes = [layer.rho.numel() for layer in layers]
    return list(zip(sigma.split(sizes), variance.split(sizes), strict=True)), kl


class _Posterior(torch.autograd.Function):
    """sigma, its square and the KL of weights with one prior; the first two flat, as in memory.

    One node of the graph: on small networks nodes cost more than their arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, prior_std: float, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, rho, sigma, variance, kl = _posterior(prior_std, parameters)
        ctx.save_for_backward(mean, rho, sigma)
        ctx.prior_variance, ctx.parameters = prior_std**2, parameters
        return sigma, variance, kl

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_sigma: Tensor, by_variance: Tensor, by_kl: Tensor
    ) -> tuple[Tensor | None, ...]:
        mean, rho, sigma = ctx.saved_tensors
        scale = by_kl / ctx.prior_variance
        by_sigma = torch.addcmul(by_sigma, sigma, by_variance, value=2)
        by_rho = by_sigma.add_(sigma * scale).sub_(by_kl / sigma).mul_(rho.sigmoid())
        sizes = [parameter.numel() for parameter in ctx.parameters]
        parts = torch.cat([mean * scale, by_rho]).split(sizes)
        return None, *map(_shaped_like, ctx.parameters, parts)


def _posterior(
    prior_std: float, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean, rho, sigma and its square, flat, and the KL, of all means, then all rhos.

    The KL is the sum of log(prior_std / sigma) + (sigma^2 + mean^2) / (2 prior_std^2) - 1/2.
    """
    number = len(parameters) // 2
    mean, rho = _flat(parameters[:number]), _flat(parameters[number:])
    sigma = softplus(rho)
    variance = sigma.square()
    squares = mean.square().sum() + variance.sum()
    constant = len(mean) * (math.log(prior_std) - 0.5)
    kl = squares / (2 * prior_std**2) - sigma.log().sum() + constant
    return mean, rho, sigma, variance, kl


def kl_divergence(net: nn.Module) -> Tensor:
    """KL(posterior || prior) in nats, in closed form, summed over all weights of a network."""
    return JointPosterior(net).kl()


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([in_memory_order(x).reshape(-1) for x in tensors])


def _shaped_like(x: Tensor, flat: Tensor) -> Tensor:
    """Numbers in the order of the memory of `x`, in its shape and layout."""
    ordered = in_memory_order(x)
    part = flat.view(ordered.shape)
    return part if ordered is x else part.permute(0, 3, 1, 2)


def local_reparametrization(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    bias: Tensor | None = None,
    geometry: Geometry | None = None,
) -> Tensor:
    """Draw the `linear_map` of `x` for weights N(mean, variance), with noise per output.

    Kingma et al. (2015), eq. 6.
    """
    out: Tensor = _LocalReparametrization.apply(x, mean, variance, bias, geometry)
    return out


class _LocalReparametrization(torch.autograd.Function):
    """f(x; mean) + sqrt(f(x^2; variance)) * eps as one node, which writes over its own buffers.

    eps has a standard deviation of 1/2. Where all inputs of an output are zero (the black
    border of a picture) its variance is zero, and fast convolutions round some to below zero:
    there the square root gets a floor, and no slope.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        bias: Tensor | None,
        geometry: Geometry | None,
    ) -> Tensor:
        if geometry is not None and variance.stride() != mean.stride():
            # A convolution goes by the layout of its weight, and arithmetic on weights may change
            # that: the two outputs would differ in theirs.
            variance = torch.empty_like(mean).copy_(variance)
        squares = x.square()
        out = linear_map(x, mean, bias, geometry)
        std = linear_map(squares, variance, None, geometry).clamp_min_(1e-30).sqrt_()
        eps = noise_like(out, std=0.5)
        out.addcmul_(std, eps, value=2)
        # The slope of the output by the variance.
        slope = eps.div_(torch.threshold_(std, 1e-15, math.inf))
        ctx.save_for_backward(x, squares, mean, variance, slope)
        ctx.geometry = geometry
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if any(tensor.dtype != grad.dtype for tensor in saved):  # in mixed precision
            saved = [tensor.to(grad.dtype) for tensor in saved]
        x, squares, mean, variance, slope = saved
        needs_x, _, _, needs_bias, _ = ctx.needs_input_grad
        by_x, by_mean, by_bias = linear_map_gradients(
            grad, x, mean, ctx.geometry, needs_x=needs_x, needs_bias=needs_bias
        )
        by_squares, by_variance, _ = linear_map_gradients(
            grad * slope, squares, variance, ctx.geometry, needs_x=needs_x, needs_bias=False
        )
        if by_x is not None and by_squares is not None:
            by_x.addcmul_(x, by_squares, value=2)
        return by_x, by_mean, by_variance, by_bias, None


def softplus(rho: Tensor) -> Tensor:
    """log(1 + exp(rho)), accurate for any rho; it is not differentiable.

    torch's own takes its logarithm from log1p, which is ten times as slow as log on the CPU:
    measured, 7.6 ms for 1.2 million numbers. With u = 1 + x rounded, log1p(x) is
    x log(u) / (u - 1), since both roundings cancel (Kahan); where u is 1 it is x.
    """
    x = rho.clamp(max=40).exp_()
    u = x + 1
    ratio = u.log().div_(u.sub_(1)).nan_to_num_(nan=1.0)
    return torch.maximum(rho, x.mul_(ratio))
