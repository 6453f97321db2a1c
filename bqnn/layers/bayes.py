"""Linear and convolutional layers whose weights have a Gaussian posterior."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bqnn.arguments import ArgumentTypeError, real_number
from bqnn.layers.draws import DrawnWeights, correlated_noise, held_draw
from bqnn.layers.linear_map import Geometry, linear_map, linear_map_gradients
from bqnn.layers.noise import in_memory_order, noise_like
from bqnn.layers.swap import check_float, swap
from bqnn.text import short

PRIOR_STD, INIT_RHO = 1.0, -5.0  # the defaults
Moments = tuple[Tensor, Tensor]  # sigma and sigma^2, flattened in memory order


class GaussianWeight(DrawnWeights):
    """Base class for layers with weights w ~ N(mean, sigma^2), sigma = softplus(rho).

    The prior of each weight is N(0, prior_std^2). The bias has a point value.

    Training mode samples the output by local reparametrization (Kingma et al. 2015, eq. 6). For a
    layer f that is linear in its weights,

        f(x; mean) + sqrt(f(x^2; sigma^2)) * eps,    eps ~ N(0, 1) for every output.

    Evaluation mode samples the weights (Blundell et al. 2015), with one draw per call. In both
    modes, a held draw is used instead (see `bqnn.layers.draws.held_draw` and `held_means`).

    In evaluation mode, the weights of all layers may be correlated (`correlate`); in training mode,
    they are independent.

    Args:
        weight: Initial means.
        bias: Initial bias, or None.
        prior_std: Standard deviation of the prior.
        init_rho: Initial rho of every weight.
    """

    mean: nn.Parameter
    rho: nn.Parameter
    bias: nn.Parameter | None
    loadings: Tensor | None
    geometry: Geometry | None = None  # None for a linear layer

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
        self.register_buffer("loadings", None)

    def correlate(self, loadings: Tensor) -> None:
        """Correlate the weights of this layer with each other, and with those of other layers.

        Args:
            loadings: The loadings of `bqnn.layers.draws.correlated_noise` [K, *mean.shape]. Layers
                with the same K share their K common factors.
        """
        self.loadings = loadings

    @property
    def sigma(self) -> Tensor:
        """The standard deviation of the posterior, shaped like the weights."""
        return self._from_joint(0)

    @torch.no_grad()
    def set_sigma(self, sigma: Tensor) -> None:
        """Set the standard deviation of the posterior.

        Args:
            sigma: Positive values, shaped like the weights.

        Raises:
            ValueError: A value is not positive.
        """
        if not (sigma > 0).all():
            raise ValueError(
                f"set_sigma: smallest value {float(sigma.min()):g}: a standard deviation must be "
                "positive; clamp it"
            )
        self.rho.copy_(sigma + torch.log(-torch.expm1(-sigma)))

    @property
    def variance(self) -> Tensor:
        """The variance of the posterior, shaped like the weights."""
        return self._from_joint(1)

    def _from_joint(self, index: int) -> Tensor:
        computed = _joint_moments.get()
        joint = None if computed is None else computed.get(self)
        if joint is None:
            (joint,), _ = _moments_and_kl(self.prior_std, [self])
        return _shaped_like(self.rho, joint[index])

    def frozen_as(self, layer: nn.Linear | nn.Conv2d) -> Self:
        """Copy `requires_grad` from the parameters of `layer`, and return self."""
        for own, source in ((self.mean, layer.weight), (self.rho, layer.weight)):
            own.requires_grad_(source.requires_grad)
        if self.bias is not None and layer.bias is not None:
            self.bias.requires_grad_(layer.bias.requires_grad)
        return self

    def draw(self) -> Tensor:
        """Draw the weights."""
        return torch.addcmul(self.mean, self.sigma, correlated_noise(self.mean, self.loadings))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.held_weights() if self.training else self.weights()
        if weights is None:
            return local_reparametrization(x, self.mean, self.variance, self.bias, self.geometry)
        return linear_map(x, weights, self.bias, self.geometry)


class BayesLinear(GaussianWeight):
    """nn.Linear with Gaussian weights: [..., in_features] -> [..., out_features].

    With inputs of more than two dimensions, training draws independent noise for each of the
    output's vectors, as for the pixels of a convolution.

    Args:
        in_features: The size of the inputs.
        out_features: The size of the outputs.
        bias: Whether there is a bias.
        device: The device of the parameters.
        dtype: The type of the parameters.
        prior_std: Standard deviation of the prior.
        init_rho: Initial rho of every weight; sigma = softplus(rho).

    Examples:
        >>> layer = BayesLinear(3, 2, prior_std=0.1)
        >>> layer(torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        prior_std: float = PRIOR_STD,
        init_rho: float = INIT_RHO,
    ) -> None:
        layer = nn.Linear(in_features, out_features, bias, device, dtype)
        super().__init__(layer.weight, layer.bias, prior_std=prior_std, init_rho=init_rho)

    @classmethod
    def like(
        cls, layer: nn.Linear, *, prior_std: float = PRIOR_STD, init_rho: float = INIT_RHO
    ) -> Self:
        """Create a Bayesian version of a linear layer.

        Args:
            layer: The layer; its weights become the means. The bias is copied.
            prior_std: Standard deviation of the prior.
            init_rho: Initial rho of every weight; sigma = softplus(rho).

        Examples:
            >>> linear = nn.Linear(3, 2)
            >>> layer = BayesLinear.like(linear, prior_std=1.0, init_rho=0.0)
            >>> torch.equal(layer.mean, linear.weight)
            True
            >>> layer.sigma[0, 0]
            tensor(0.6931, grad_fn=<SelectBackward0>)
        """
        made = cls.__new__(cls)
        GaussianWeight.__init__(
            made, layer.weight, layer.bias, prior_std=prior_std, init_rho=init_rho
        )
        return made.frozen_as(layer)

    @property
    def in_features(self) -> int:
        """The size of the inputs."""
        return self.mean.shape[1]

    @property
    def out_features(self) -> int:
        """The size of the outputs."""
        return self.mean.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2 or x.dim() == 0:
            return super().forward(x)
        out = super().forward(x.reshape(-1, x.shape[-1]))
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def extra_repr(self) -> str:
        return f"{self.mean.shape[1]}, {self.mean.shape[0]}, prior_std={self.prior_std}"


class BayesConv2d(GaussianWeight):
    """nn.Conv2d with Gaussian weights: [B, C, H, W] -> [B, C', H', W'].

    Args:
        in_channels: The number of input channels C.
        out_channels: The number of output channels C'.
        kernel_size: Height and width of the filters, or one number for both.
        stride: The step of the filters.
        padding: Zeros on each side: numbers, "same" or "valid".
        dilation: The step between the inputs of a filter.
        groups: The number of groups of channels.
        bias: Whether there is a bias.
        padding_mode: "zeros"; no other mode is supported.
        device: The device of the parameters.
        dtype: The type of the parameters.
        prior_std: Standard deviation of the prior.
        init_rho: Initial rho of every weight; sigma = softplus(rho).

    Raises:
        TypeError: The padding is asymmetric, or is not zero padding.

    Examples:
        >>> layer = BayesConv2d(1, 4, 3, padding=1, prior_std=0.1)
        >>> layer(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    geometry: Geometry

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        prior_std: float = PRIOR_STD,
        init_rho: float = INIT_RHO,
    ) -> None:
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        layer = nn.Conv2d(*sizes, bias, padding_mode, device, dtype)
        super().__init__(layer.weight, layer.bias, prior_std=prior_std, init_rho=init_rho)
        self.geometry = Geometry.of(layer)

    @classmethod
    def like(
        cls, layer: nn.Conv2d, *, prior_std: float = PRIOR_STD, init_rho: float = INIT_RHO
    ) -> Self:
        """Create a Bayesian version of a convolution.

        Args:
            layer: The layer; its weights become the means. The bias and the geometry are copied.
            prior_std: Standard deviation of the prior.
            init_rho: Initial rho of every weight; sigma = softplus(rho).

        Raises:
            TypeError: The padding is asymmetric, or is not zero padding.

        Examples:
            >>> BayesConv2d.like(nn.Conv2d(1, 4, 3)).mean.shape
            torch.Size([4, 1, 3, 3])
        """
        geometry = Geometry.of(layer)
        made = cls.__new__(cls)
        GaussianWeight.__init__(
            made, layer.weight, layer.bias, prior_std=prior_std, init_rho=init_rho
        )
        made.geometry = geometry
        return made.frozen_as(layer)

    @property
    def in_channels(self) -> int:
        """The number of input channels."""
        return self.mean.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """The number of output channels."""
        return self.mean.shape[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Height and width of the filters."""
        return tuple(self.mean.shape[2:])

    @property
    def stride(self) -> tuple[int, ...]:
        """The step of the filters."""
        return self.geometry.stride

    @property
    def padding(self) -> tuple[int, ...]:
        """Zeros on each side."""
        return self.geometry.padding

    @property
    def dilation(self) -> tuple[int, ...]:
        """The step between the inputs of a filter."""
        return self.geometry.dilation

    @property
    def groups(self) -> int:
        """The number of groups of channels."""
        return self.geometry.groups

    def extra_repr(self) -> str:
        geometry = ", ".join(f"{key}={value}" for key, value in self.geometry._asdict().items())
        return f"{tuple(self.mean.shape)}, {geometry}, prior_std={self.prior_std}"


def to_bayes(
    net: nn.Module,
    prior_std: float = PRIOR_STD,
    init_rho: float = INIT_RHO,
    *,
    keep: type[nn.Module] | Collection[type[nn.Module]] = (),
) -> nn.Module:
    """Replace every linear layer and convolution by its Bayesian version, in place.

    Batch norms keep point-valued parameters.

    Args:
        net: The network. It stays unchanged when an error is raised.
        prior_std: Standard deviation of the prior, above 0.
        init_rho: Initial rho of every weight, from -80 to 80; sigma = softplus(rho).
        keep: Further types of modules whose own parameters keep point values, such as
            nn.LayerNorm, nn.Embedding or nn.MultiheadAttention. The modules of torch.nn stay whole;
            the layers inside of other types are converted.

    Returns:
        The network.

    Raises:
        ValueError: There is no linear layer or convolution, or a number is out of range.
        TypeError: A module with parameters is not supported, and not in `keep`.

    Examples:
        >>> to_bayes(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), prior_std=1.0, init_rho=-5.0)
        Sequential(
          (0): BayesLinear(3, 2, prior_std=1.0)
          (1): ReLU()
        )
    """
    prior_std, init_rho = _checked(prior_std, init_rho)
    kept = (keep,) if isinstance(keep, type) else tuple(keep)
    if not all(isinstance(kind, type) for kind in kept):
        raise ArgumentTypeError(
            f"keep={short(keep)}: give types of modules, such as nn.LayerNorm", "keep"
        )
    check_float(net, "to_bayes")
    for name, module in net.named_modules():
        if isinstance(module, GaussianWeight) and not isinstance(module, kept):
            raise TypeError(
                f"to_bayes: {name or 'the network'} is a {type(module).__name__} already; convert "
                f"a network once, or give keep=({type(module).__name__},)"
            )
    count = swap(
        net,
        {
            nn.Linear: partial(BayesLinear.like, prior_std=prior_std, init_rho=init_rho),
            nn.Conv2d: partial(BayesConv2d.like, prior_std=prior_std, init_rho=init_rho),
        },
        keep=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *kept),
    )
    if count == 0:
        raise ValueError("to_bayes: the network has no Linear or Conv2d to convert")
    return net


@contextmanager
def held_means(net: nn.Module) -> Iterator[None]:
    """Hold the means of all Gaussian weights of a network as its draw, in this thread.

    The network then computes without noise, also in training mode, and gradients reach the means.

    Args:
        net: The network, before it is quantized.

    Examples:
        >>> net = to_bayes(nn.Sequential(nn.Linear(3, 2)), prior_std=1.0, init_rho=0.0)
        >>> with held_means(net):
        ...     output = net(torch.ones(1, 3))
        >>> torch.allclose(output, net[0].mean.sum(1) + net[0].bias)
        True
    """
    layers = [module for module in net.modules() if isinstance(module, GaussianWeight)]
    with held_draw(net, 0, made={layer: layer.mean for layer in layers}):
        yield


def _checked(prior_std: float, init_rho: float) -> tuple[float, float]:
    reason = "a standard deviation must be positive and finite; 1 is usual"
    prior_std = real_number("prior_std", prior_std, reason, 0, without=(0,))
    reason = "sigma = softplus(rho) must stay in the range of floats; choose -80 to 80"
    return prior_std, real_number("init_rho", init_rho, f"{reason}, -5 is usual", -80, 80)


# The joint results that the layers use in this thread.
_joint_moments: ContextVar[dict[GaussianWeight, Moments] | None] = ContextVar(
    "joint moments", default=None
)


class JointPosterior:
    """Context manager that computes sigma of all Gaussian weights of a network at once.

    Inside the `with` statement, the layers of this thread read sigma and sigma^2 from the joint
    result instead of computing their own. On small networks this halves the cost of the posterior
    in a training step. Functions traced by torch.compile ignore it, because the compiler fuses
    the layers' own computations. The gradients of all means and rhos arrive together, at the end
    of the backward pass.

    Args:
        net: The network.

    Examples:
        >>> net = to_bayes(nn.Sequential(nn.Linear(3, 2)), prior_std=1.0, init_rho=-5.0)
        >>> with JointPosterior(net) as posterior:
        ...     output = net(torch.zeros(4, 3))
        >>> torch.equal(posterior.kl(), kl_divergence(net))
        True
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
        if not torch.compiler.is_compiling():  # torch.compile cannot trace context variables
            self._token = _joint_moments.set({**(_joint_moments.get() or {}), **self._moments})
        return self

    def __exit__(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            _joint_moments.reset(self._token)

    def kl(self) -> Tensor:
        """Return the KL divergence in nats, see `kl_divergence`."""
        if not self._kls:
            raise TypeError(
                "kl_divergence: the network has no Gaussian weights; call to_bayes() on it first"
            )
        return torch.stack(self._kls).sum()


def _moments_and_kl(prior_std: float, layers: list[GaussianWeight]) -> tuple[list[Moments], Tensor]:
    """Return flat sigma and sigma^2 of each layer, and the KL summed over the layers."""
    parameters = [layer.mean for layer in layers] + [layer.rho for layer in layers]
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        sigma, variance, kl = _Posterior.apply(prior_std, *parameters)
    else:  # torch.compile drops the parameters of a Function that needs no gradient
        _, _, sigma, variance, kl = _posterior(prior_std, parameters)
    sizes = [layer.rho.numel() for layer in layers]
    return list(zip(sigma.split(sizes), variance.split(sizes), strict=True)), kl


class _Posterior(torch.autograd.Function):
    """Compute sigma, sigma^2 (both flat, in memory order) and the KL of weights with one prior.

    It is a single autograd node: on small networks a node costs more than its arithmetic.
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
    """Return flat mean, rho, sigma and sigma^2, and the KL; the parameters are means, then rhos.

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
    """Compute KL(posterior || prior) in closed form, summed over all Gaussian weights.

    Args:
        net: A network with Gaussian weights, see `to_bayes`.

    Returns:
        A scalar in nats: the sum of
        log(prior_std / sigma) + (sigma^2 + mean^2) / (2 prior_std^2) - 1/2.

    Raises:
        TypeError: The network has no Gaussian weights.

    Examples:
        >>> layer = BayesLinear(3, 2, prior_std=1.0)
        >>> layer.mean = nn.Parameter(torch.zeros(2, 3))
        >>> layer.set_sigma(torch.full((2, 3), 0.5))
        >>> round(kl_divergence(layer).item(), 3)  # 6 (log 2 - 3/8)
        1.909
    """
    return JointPosterior(net).kl()


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([in_memory_order(x).reshape(-1) for x in tensors])


def _shaped_like(x: Tensor, flat: Tensor) -> Tensor:
    """Reshape values in the memory order of `x` to its shape and layout."""
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
    """Sample `linear_map(x)` for weights N(mean, variance), with independent noise per output.

    Kingma et al. 2015, eq. 6.

    Args:
        x: Inputs [B, in_features], or [B, C, H, W] for a convolution.
        mean: Means of the weights.
        variance: Variances of the weights, shaped like `mean`.
        bias: Bias [out_features], or None.
        geometry: Geometry of the convolution; None for a linear layer.

    Returns:
        f(x; mean) + bias + sqrt(f(x^2; variance)) * eps with eps ~ N(0, 1), shaped like the output
        of the layer.

    Examples:
        >>> x, mean = torch.ones(1, 3), torch.ones(2, 3)
        >>> local_reparametrization(x, mean, torch.zeros(2, 3))
        tensor([[3., 3.]])
    """
    out: Tensor = _LocalReparametrization.apply(x, mean, variance, bias, geometry)
    return out


class _LocalReparametrization(torch.autograd.Function):
    """f(x; mean) + sqrt(f(x^2; variance)) * eps as one autograd node that reuses its buffers.

    eps is drawn with standard deviation 1/2. An output whose inputs are all zero (at the black
    border of an image) has zero variance, which fast convolutions may round below zero. The
    square root is clamped there, and its gradient is zero.
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
            # The layout of a convolution's output follows its weight, and arithmetic may have
            # changed the layout of the variance.
            variance = torch.empty_like(mean).copy_(variance)
        squares = x.square()
        out = linear_map(x, mean, bias, geometry)
        std = linear_map(squares, variance, None, geometry).clamp_min_(1e-30).sqrt_()
        eps = noise_like(out, std=0.5)
        out.addcmul_(std, eps, value=2)
        # The derivative of the output with respect to its variance.
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
    """Compute log(1 + exp(rho)) accurately for any rho, without support for gradients.

    torch's softplus uses log1p, which is ten times slower than log on the CPU (7.6 ms for 1.2
    million numbers). With u = 1 + x rounded, log1p(x) = x log(u) / (u - 1), because the two
    rounding errors cancel (Kahan); for u = 1 it is x.

    Examples:
        >>> softplus(torch.tensor([0.0, 100.0]))
        tensor([  0.6931, 100.0000])
    """
    x = rho.clamp(max=40).exp_()
    u = x + 1
    ratio = u.log().div_(u.sub_(1)).nan_to_num_(nan=1.0)
    return torch.maximum(rho, x.mul_(ratio))
