"""Reconstruction: fit the integers and the bias of each layer to its outputs in float.

Rounding each weight to its nearest integer has the least error in the weights, but not in the
outputs. `reconstruct` passes rows through a calibrated network, in float and rounded, and changes
one layer after the other, so that its outputs for rounded inputs come close to those of the float
network for float inputs. Gaussian weights are at their means meanwhile.
"""

from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bqnn.layers.draws import held_draw
from bqnn.layers.linear_map import Geometry
from bqnn.layers.noise import reseed
from bqnn.quant.fake_quant import FakeQuant
from bqnn.quant.simulated import (
    SimulatedGaussianLayer,
    SimulatedLayer,
    calibrate,
    enable,
    parts,
)
from bqnn.quant.spec import QuantSpec
from bqnn.seeds import Stream, stream_seed

MOST_VALUES = 2**28  # in the inputs of all layers, which are kept: 1 GB
DAMPING = 0.01  # as a share of the mean square of the inputs
MOST_SWEEPS = 20
BLOCK = 64  # weights of a channel that move before the others see it
MOST_PATCHES = 2**16  # rows of a linear layer, or what outputs of a convolution read
ROWS, LARGEST = 32, 2**25  # whose patches are made at once, and their values
SMALLEST_FACTOR = 1e-12  # of batch norm; below, its channel is constant


class Moments(NamedTuple):
    """Means over the inputs of a layer in float, x [D], and rounded, q [D], for G groups.

    Attributes:
        x: E[x], [G, D], in float64, as all of them.
        q: E[q], [G, D].
        xq: E[x q^T], [G, D, D].
        qq: E[q q^T], [G, D, D].
    """

    x: Tensor
    q: Tensor
    xq: Tensor
    qq: Tensor

    @classmethod
    def of(
        cls, x: Tensor, q: Tensor, kernel: tuple[int, ...] = (), geometry: Geometry | None = None
    ) -> Self:
        """Compute the moments of inputs [N, F], or of the patches of inputs [B, C, H, W].

        Rows after the first `MOST_PATCHES` patches are not used.

        Args:
            x: Inputs in float.
            q: Rounded inputs, shaped like `x`.
            kernel: The kernel size of a convolution.
            geometry: The geometry of a convolution; None for a linear layer.
        """
        count, sums = 0, None
        at_once = max(1, min(ROWS, LARGEST // max(1, x[0].numel() * prod(kernel))))
        for some in zip(x.split(at_once), q.split(at_once), strict=True):
            if count >= MOST_PATCHES:
                break
            own, other = (_patches(rows, kernel, geometry) for rows in some)
            count += own.shape[1]
            found = (own.sum(1), other.sum(1), own.mT @ other, other.mT @ other)
            doubles = [each.cpu().double() for each in found]
            sums = doubles if sums is None else list(map(torch.add, sums, doubles))
        assert sums is not None
        return cls(*(each / count for each in sums))

    def centered(self) -> Self:
        """Return the moments with covariances in place of second moments."""
        x, q = self.x.unsqueeze(2), self.q.unsqueeze(1)
        return self._replace(xq=self.xq - x * q, qq=self.qq - q.mT * q)


def calibrate_by(spec: QuantSpec, net: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Calibrate a network, and reconstruct its layers if the spec asks for it.

    Args:
        spec: Bit widths and ranges.
        net: A prepared network. It moves to evaluation mode.
        batches: Inputs [B, ...] of the network. The reconstruction uses those that are shaped like
            those of the first batch.

    Returns:
        The network.

    Raises:
        ValueError: As of `bqnn.quant.simulated.calibrate`.
        TypeError: As of `bqnn.quant.simulated.calibrate`.

    Examples:
        >>> from bqnn.layers.markers import Enter, Leave
        >>> from bqnn.quant.fuse import fuse
        >>> from bqnn.quant.simulated import prepare
        >>> spec = QuantSpec(weight_bits=2, weight_rounding="adaptive", bias_correction=True)
        >>> net = nn.Sequential(Enter(), nn.Linear(3, 2), Leave())
        >>> net = calibrate_by(spec, prepare(fuse(net), spec), [torch.randn(16, 3)])
        >>> net(torch.randn(4, 3)).shape
        torch.Size([4, 2])
    """
    weights, bias = spec.weight_rounding == "adaptive", spec.bias_correction
    if not weights and not bias:
        return calibrate(net, batches)
    kept = list(batches)
    calibrate(net, kept)
    rows = torch.cat([batch for batch in kept if batch.shape[1:] == kept[0].shape[1:]])
    for part in parts(net):
        reconstruct(part, rows, weights=weights, bias=bias)
    return net


@torch.no_grad()
def reconstruct(net: nn.Module, rows: Tensor, *, weights: bool, bias: bool) -> None:
    """Fit each layer of a calibrated network to its outputs in float, in place.

    Args:
        net: A calibrated network, which is not an ensemble.
        rows: Inputs [B, ...] of the network. Fewer are used if the inputs of all layers take more
            than 1 GB.
        weights: Whether to choose the integers of the weights, or of their means, by `descend`.
            The weights become the floats of their integers.
        bias: Whether to change the biases, so that the mean error of each channel is 0 (Nagel et
            al., arXiv 1906.04721, section 4.2).
    """
    rows = rows[: _most_rows(net, rows)]
    floats = _inputs_in_float(net, rows)

    def fit(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, SimulatedLayer)
        x = floats.pop(layer, None)
        if x is None:  # it is called again
            return
        q = layer.rows_of(inputs[0])
        moments = Moments.of(x, q, layer.weight_shape[2:], layer.geometry)
        _fit(layer, moments, weights=weights, bias=bias)
        if isinstance(layer, SimulatedGaussianLayer):
            means[layer].copy_(layer.mean_draw())

    means = _means(net)
    _pass(net, rows, means, [layer.register_forward_pre_hook(fit) for layer in floats])


def descend(weight: Tensor, moments: Moments, quant: FakeQuant) -> Tensor:
    """Choose grid points near the weights that minimize the error of a layer's outputs.

        E |W x - Q q|^2 + damping |W - Q|^2

    The nearest points are the start. Each weight in turn moves to the point with the least error,
    given the others, until none moves: cyclic coordinate descent (Behdin et al., arXiv 2309.01885)
    on the objective of AdaRound (Nagel et al., arXiv 2004.10568). The error is therefore never
    above that of the nearest points.

    Args:
        weight: Weights W [C, D].
        moments: Moments of the inputs. With G groups, each has C / G consecutive channels.
        quant: The grid of the weights.

    Returns:
        Q, shaped like `weight`.

    Examples:
        >>> from bqnn.quant.fake_quant import make_fixed_fake_quant
        >>> quant = make_fixed_fake_quant(3, largest=3.0)
        >>> x = torch.tensor([[1.0, 1.0], [2.0, 2.0]])  # equal inputs: the sum of weights counts
        >>> weight = torch.tensor([[0.4, 0.4]])
        >>> quant.round(weight), descend(weight, Moments.of(x, x), quant)
        (tensor([[0., 0.]]), tensor([[1., 0.]]))
    """
    count = len(weight)
    scale, zero_point = (
        grid.cpu().double().expand(count) for grid in (quant.scale, quant.zero_point)
    )
    ends = quant.quant_min - zero_point, quant.quant_max - zero_point
    steps = quant.integers(weight).cpu().double() - zero_point.unsqueeze(1)
    exact, size = weight.cpu().double(), count // len(moments.qq)
    for number, (xq, qq) in enumerate(zip(moments.xq, moments.qq, strict=True)):
        own = slice(number * size, (number + 1) * size)
        damping = DAMPING * qq.diagonal().mean() * torch.eye(len(qq), dtype=qq.dtype)
        target = exact[own] @ (xq + damping)
        _descend(steps[own], target, qq + damping, scale[own], (ends[0][own], ends[1][own]))
    return (steps * scale.unsqueeze(1)).to(weight)


def _descend(
    steps: Tensor, target: Tensor, hessian: Tensor, scale: Tensor, ends: tuple[Tensor, Tensor]
) -> None:
    """Minimize tr(Q H Q^T) - 2 tr(Q T^T) over the whole numbers in Q = scale * steps, in place."""
    slope = (steps * scale.unsqueeze(1)) @ hessian - target  # half of the gradient
    for _ in range(MOST_SWEEPS):
        before = steps.clone()
        for start in range(0, steps.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            own, moved = slope[:, block].clone(), torch.zeros_like(slope[:, block])
            for place, curvature in enumerate(hessian[block, block]):
                if curvature[place] <= 0:  # the input is always 0
                    continue
                step = steps[:, start + place]
                best = step - own[:, place] / curvature[place] / scale
                # Ties stay, so that the descent ends.
                best = torch.where((best - step).abs() <= 0.5, step, best.round())
                best = torch.minimum(torch.maximum(best, ends[0]), ends[1])
                moved[:, place] = (best - step) * scale
                own += moved[:, place, None] * curvature
                steps[:, start + place] = best
            slope += moved @ hessian[block]
        if torch.equal(before, steps):
            break


def _patches(x: Tensor, kernel: tuple[int, ...], geometry: Geometry | None) -> Tensor:
    """Return what each output of a layer reads, [G, N, D]."""
    if geometry is None:
        return x.unsqueeze(0)
    stride, padding, dilation, groups = geometry
    columns = F.unfold(x, kernel, dilation, padding, stride)  # [B, G D, L]
    return columns.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _most_rows(net: nn.Module, rows: Tensor) -> int:
    """Return how many rows have at most `MOST_VALUES` values in the inputs of all layers."""
    values = sum(x.numel() for x in _inputs_in_float(net, rows[:1]).values())
    return max(1, MOST_VALUES // max(1, values))


def _inputs_in_float(net: nn.Module, rows: Tensor) -> dict[SimulatedLayer, Tensor]:
    """Return the inputs of each layer without rounding, at its first call."""
    found: dict[SimulatedLayer, Tensor] = {}

    def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, SimulatedLayer)
        found.setdefault(layer, layer.rows_of(inputs[0]))

    layers = [module for module in net.modules() if isinstance(module, SimulatedLayer)]
    enable(net, False)
    _pass(net, rows, _means(net), [layer.register_forward_pre_hook(keep) for layer in layers])
    enable(net)
    return found


def _means(net: nn.Module) -> dict[nn.Module, Tensor]:
    """Return the draw of each Gaussian weight without noise."""
    layers = [module for module in net.modules() if isinstance(module, SimulatedGaussianLayer)]
    return {layer: layer.mean_draw().clone() for layer in layers}


def _pass(net: nn.Module, rows: Tensor, means: dict[nn.Module, Tensor], hooks: list[Any]) -> None:
    """Pass rows through a network with the means as its draw, and equal masks in each call."""
    reseed(torch.device("cpu"), stream_seed(0, Stream.CALIBRATION))
    try:
        with held_draw(net, 0, made=means):
            net(rows)
    finally:
        for hook in hooks:
            hook.remove()


def _fit(layer: SimulatedLayer, moments: Moments, *, weights: bool, bias: bool) -> None:
    """Change the weights and the bias of a layer, into which batch norm is folded."""
    param, quant = layer.weight_or_mean()
    factor, _ = layer.fold()
    along = torch.ones_like(param[:1]) if factor is None else FakeQuant.along(param, factor)
    flat = (param * along).flatten(1)
    rounded = flat if quant is None else quant.round(flat)
    if weights:
        assert quant is not None
        rounded = descend(flat, moments.centered() if bias else moments, quant)
        found = rounded.reshape(param.shape) / along
        param.copy_(torch.where(along.abs() > SMALLEST_FACTOR, found, param))
    if bias:
        size = len(flat) // len(moments.x)
        x, q = (mean.to(flat).repeat_interleave(size, 0) for mean in (moments.x, moments.q))
        own = layer.bias if layer.bn is None else layer.bn.bias
        own += (flat * x - rounded * q).sum(1)
