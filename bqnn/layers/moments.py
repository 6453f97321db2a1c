"""Means and variances of activations, and how layers change them.

Activations are taken as independent Gaussians, as in deterministic variational inference (Wu et al.
2019) and lightweight probabilistic networks (Gast & Roth 2018).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bqnn.layers.bayes import GaussianWeight
from bqnn.layers.dropout import MCDropout
from bqnn.layers.linear_map import Geometry, linear_map
from bqnn.layers.markers import Add, AvgPool, Cat, Pool, SpatialMean
from bqnn.text import type_of

SMALLEST_VARIANCE = 1e-30  # added where a quotient needs it


class NoMomentsError(TypeError):
    """The moments of the outputs of a module are not known."""


class Moments(NamedTuple):
    """Activations as independent Gaussians.

    Attributes:
        mean: Their means [B, ...].
        variance: Their variances [B, ...]; None if they are not random.
    """

    mean: Tensor
    variance: Tensor | None = None

    def known_variance(self) -> Tensor:
        """Return the variances, which are zeros if the activations are not random."""
        return torch.zeros_like(self.mean) if self.variance is None else self.variance

    def each(self, move: Callable[[Tensor], Tensor]) -> "Moments":
        """Apply a function that moves elements, such as a flattening."""
        return Moments(move(self.mean), None if self.variance is None else move(self.variance))


Rule = Callable[..., Moments]  # of the moments of the inputs of a module


class WithMoments(nn.Module):
    """Base class of modules that know the moments of their outputs."""

    def moment_rule(self) -> Rule:
        """Return a function that computes the moments of the outputs from those of the inputs.

        The function may keep what it computes from the weights.
        """
        raise NotImplementedError


def maximum(x: Moments, y: Moments) -> Moments:
    r"""Compute the moments of max(x, y) (Clark 1961).

    With \theta^2 = Var x + Var y, \alpha = (E x - E y) / \theta and g(a) = a \Phi(a) + \phi(a),

        E max   = \Phi(\alpha) E x + \Phi(-\alpha) E y + \theta \phi(\alpha)
        Var max = \Phi(\alpha) Var x + \Phi(-\alpha) Var y - \theta^2 g(\alpha) g(-\alpha).

    Examples:
        >>> x = Moments(torch.zeros(1), torch.ones(1))
        >>> maximum(x, x)  # 1 / sqrt(pi) and 1 - 1 / pi
        Moments(mean=tensor([0.5642]), variance=tensor([0.6817]))
    """
    first, second = x.known_variance(), y.known_variance()
    squared = (first + second).add_(SMALLEST_VARIANCE)
    theta = squared.sqrt()
    # Beyond 12, Phi is 0 or 1 in float32; phi stays above the tiny numbers that slow a CPU down.
    alpha = (x.mean - y.mean).div_(theta).clamp_(-12, 12)
    share = (alpha * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)  # Phi
    density = alpha.square().mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))  # phi
    mean = torch.lerp(y.mean, x.mean, share).addcmul_(theta, density)
    gain = density.addcmul_(alpha, share)  # g
    variance = torch.lerp(second, first, share)
    variance.addcmul_(squared.mul_(gain), alpha.sub_(gain))
    return Moments(mean, variance.clamp_min_(0))


def rectified(x: Moments, cap: float | None = None) -> Moments:
    """Compute the moments of relu(x), or of min(relu(x), cap).

    Examples:
        >>> mean, variance = rectified(Moments(torch.zeros(1), torch.ones(1)))
        >>> round(mean.item(), 4), round(variance.item(), 4)  # 1 / sqrt(2 pi), (1 - 1 / pi) / 2
        (0.3989, 0.3408)
    """
    if x.variance is None:
        return Moments(x.mean.relu() if cap is None else x.mean.clamp(0, cap))
    zero = torch.zeros((), dtype=x.mean.dtype, device=x.mean.device)
    out = maximum(x, Moments(zero, zero))
    if cap is None:
        return out
    below = maximum(Moments(-out.mean, out.variance), Moments(zero - cap, zero))
    return Moments(-below.mean, below.variance)


def linear_moments(
    mean: Tensor, variance: Tensor | None, bias: Tensor | None, geometry: Geometry | None
) -> Rule:
    """Return a rule for a linear layer or convolution with independent random weights.

        Var = f(Var x; mean^2 + variance) + f((E x)^2; variance)

    Args:
        mean: Means of the weights.
        variance: Variances of the weights; None for point-valued ones.
        bias: Bias, or None.
        geometry: Geometry of the convolution; None for a linear layer.

    Examples:
        >>> rule = linear_moments(torch.ones(1, 2), torch.ones(1, 2), None, None)
        >>> rule(Moments(torch.ones(1, 2)))
        Moments(mean=tensor([[2.]]), variance=tensor([[2.]]))
    """
    squares = mean.square() if variance is None else mean.square() + variance

    def rule(x: Moments) -> Moments:
        out = linear_map(x.mean, mean, bias, geometry)
        of_out = None
        if x.variance is not None:
            of_out = linear_map(x.variance, squares, None, geometry)
        if variance is not None:
            by_weights = linear_map(x.mean.square(), variance, None, geometry)
            of_out = by_weights if of_out is None else of_out.add_(by_weights)
        return Moments(out, None if of_out is None else of_out.clamp_min_(0))

    return rule


def dropped(x: Moments, rate: float) -> Moments:
    """Compute the moments after MC dropout, as if each value had a mask of its own.

    Examples:
        >>> dropped(Moments(torch.ones(1)), 0.5)
        Moments(mean=tensor([1.]), variance=tensor([1.]))
    """
    if rate == 0:
        return x
    variance = x.mean.square() * (rate / (1 - rate))
    if x.variance is not None:
        variance.add_(x.variance, alpha=1 / (1 - rate))
    return Moments(x.mean, variance)


def max_pooled(x: Moments, pool: nn.MaxPool2d) -> Moments:
    """Compute the moments of max pooling: the maximum of two values, of it and a third, and so on.

    Raises:
        NoMomentsError: The windows are dilated or rounded up, or indices are asked for.
    """
    if x.variance is None:
        return Moments(pool(x.mean))
    size, stride, padding = (_pair(each) for each in (pool.kernel_size, pool.stride, pool.padding))
    if pool.ceil_mode or pool.return_indices or _pair(pool.dilation) != (1, 1):
        raise NoMomentsError("max pooling with dilation, ceil_mode or indices has no moments")
    if padding != (0, 0):
        sides = (padding[1], padding[1], padding[0], padding[0])
        x = Moments(F.pad(x.mean, sides, value=-1e30), F.pad(x.variance, sides))
    return _along(_along(x, 2, size[0], stride[0]), 3, size[1], stride[1])


def _along(x: Moments, dim: int, size: int, stride: int) -> Moments:
    """Compute the moments of the maximum over windows of one dimension."""
    count = (x.mean.shape[dim] - size) // stride + 1

    def start(offset: int) -> Moments:
        index = [slice(None)] * 4
        index[dim] = slice(offset, offset + stride * (count - 1) + 1, stride)
        return x.each(lambda values: _dense(values[tuple(index)]))

    out = start(0)
    for offset in range(1, size):
        out = maximum(out, start(offset))
    return out


def _dense(x: Tensor) -> Tensor:
    """Copy a slice to memory without gaps, in its layout; several operations read it."""
    return torch.empty_like(x).copy_(x)


def averaged(x: Moments, pool: nn.Module) -> Moments:
    """Compute the moments of means over windows of n values: Var = mean(Var x) / n.

    Raises:
        NoMomentsError: The windows have different numbers of values.
    """
    mean = pool(x.mean)
    if x.variance is None:
        return Moments(mean)
    return Moments(mean, pool(x.variance) / _window(pool, x.mean.shape[2:]))


def _window(pool: nn.Module, size: torch.Size) -> int:
    """Return the number of values in each window of an average pooling."""
    if isinstance(pool, AvgPool):
        return _window(pool.pool, size)
    if isinstance(pool, Pool | SpatialMean):
        return size.numel()
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        outputs = _pair(pool.output_size)
        if all(s % o == 0 for s, o in zip(size, outputs, strict=True)):
            return size.numel() // math.prod(outputs)
    if isinstance(pool, nn.AvgPool2d) and not pool.ceil_mode and pool.divisor_override is None:
        is_whole = pool.count_include_pad or _pair(pool.padding) == (0, 0)
        if is_whole:
            return math.prod(_pair(pool.kernel_size))
    raise NoMomentsError("average pooling over windows of different sizes has no moments")


def normalized(x: Moments, bn: nn.BatchNorm1d | nn.BatchNorm2d) -> Moments:
    """Compute the moments of batch norm in evaluation mode, an affine map of each channel.

    Raises:
        NoMomentsError: The batch norm has no running statistics.
    """
    if bn.running_var is None:
        raise NoMomentsError("batch norm without running statistics has no moments")
    mean = bn(x.mean)
    if x.variance is None:
        return Moments(mean)
    factor = (bn.running_var + bn.eps).reciprocal()
    factor = factor if bn.weight is None else factor * bn.weight.square()
    return Moments(mean, x.variance * factor.view(1, -1, *[1] * (mean.dim() - 2)))


def added(x: Moments, y: Moments) -> Moments:
    """Compute the moments of a sum.

    Raises:
        NoMomentsError: A summand is no activation.
    """
    if not (isinstance(x, Moments) and isinstance(y, Moments)):
        raise NoMomentsError("a sum with a constant has no moments")
    if x.variance is None or y.variance is None:
        return Moments(x.mean + y.mean, y.variance if x.variance is None else x.variance)
    return Moments(x.mean + y.mean, x.variance + y.variance)


def concatenated(parts: Sequence[Moments], dim: int) -> Moments:
    """Compute the moments of a concatenation."""
    mean = torch.cat([part.mean for part in parts], dim)
    if all(part.variance is None for part in parts):
        return Moments(mean)
    return Moments(mean, torch.cat([part.known_variance() for part in parts], dim))


def _of_point(layer: nn.Linear | nn.Conv2d) -> Rule:
    geometry = Geometry.of(layer) if isinstance(layer, nn.Conv2d) else None
    return linear_moments(layer.weight, None, layer.bias, geometry)


def refuse_correlated(layer: GaussianWeight) -> None:
    """Raise a NoMomentsError if the weights of a layer are correlated with each other."""
    if layer.loadings is not None:
        raise NoMomentsError(
            "a layer with correlated weights (low-rank SWAG), which has no moments"
        )


def _of_gaussian(layer: GaussianWeight) -> Rule:
    refuse_correlated(layer)
    return linear_moments(layer.mean, layer.variance, layer.bias, layer.geometry)


def _of_add(add: Add) -> Rule:
    return (lambda x, y: rectified(added(x, y))) if add.relu else added


def _unchanged(module: nn.Module) -> Rule:
    return lambda x: x


# For each type of module, a function that makes the rule of a module.
RULES: Mapping[type[nn.Module], Callable[[Any], Rule]] = {
    WithMoments: lambda module: module.moment_rule(),
    GaussianWeight: _of_gaussian,
    MCDropout: lambda dropout: lambda x: dropped(x, dropout.rate),
    nn.Linear: _of_point,
    nn.Conv2d: _of_point,
    nn.BatchNorm1d: lambda bn: lambda x: normalized(x, bn),
    nn.BatchNorm2d: lambda bn: lambda x: normalized(x, bn),
    nn.ReLU: lambda _: rectified,
    nn.ReLU6: lambda _: lambda x: rectified(x, 6.0),
    nn.MaxPool2d: lambda pool: lambda x: max_pooled(x, pool),
    **dict.fromkeys(
        (nn.AvgPool2d, nn.AdaptiveAvgPool2d, AvgPool, SpatialMean, Pool),
        lambda pool: lambda x: averaged(x, pool),
    ),
    Add: _of_add,
    Cat: lambda cat: lambda *parts: concatenated(parts, cat.dim),
    nn.Flatten: lambda flatten: lambda x: x.each(flatten),
    nn.Unflatten: lambda unflatten: lambda x: x.each(unflatten),
    nn.Identity: _unchanged,  # also DropoutSite, Enter and Leave
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d), _unchanged),  # off in evaluation
}


def rule_of(module: nn.Module) -> Rule:
    """Return the rule of a module: a function of the moments of its inputs.

    Raises:
        NoMomentsError: The moments of its outputs are not known.

    Examples:
        >>> rule_of(nn.ReLU())(Moments(torch.tensor([-1.0])))
        Moments(mean=tensor([0.]), variance=None)
    """
    kind = next((kind for kind in type(module).__mro__ if kind in RULES), None)
    if kind is None:
        raise NoMomentsError(f"{type_of(module)}, whose moments are not known")
    return RULES[kind](module)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
