"""Activations as plain integers: tensors in uint8 that carry their grid.

torch has no convolutions of uint8 tensors in its core, so an engine on plain integers brings its
own. What moves elements runs on the integers as it is. ReLU and max pooling are written with
operations that torch has for uint8 on every device.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bqnn.quant.engines import rounding
from bqnn.quant.engines.contract import ActivationGrid, Layer, LayerEngine, is_dense
from bqnn.quant.grids import UNTRACED, Grid, OnGrid, plain

RELUS_INPLACE = (torch.relu_, Tensor.relu_)
RELUS = (F.relu, torch.relu, Tensor.relu, *RELUS_INPLACE)
CHUNK = 2**16  # elements of a residual sum that are added at a time, so that they stay in a cache


class PlainIntegers(OnGrid):
    """Activations in uint8 on a grid."""

    @property
    def is_nested(self) -> bool:  # type: ignore[override]  # the first query of torch.compile
        raise torch._dynamo.exc.SkipFrame(UNTRACED)  # what reads integers runs uncompiled

    @classmethod
    def call(cls, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], grid: Grid) -> Any:
        if func in RELUS:
            is_inplace = func in RELUS_INPLACE or kwargs.get("inplace", args[1:] == (True,))
            return (args[0].clamp_min_ if is_inplace else args[0].clamp_min)(grid.zero_point)
        if func in (F.max_pool2d, torch.max_pool2d):
            return max_pool(*args, **kwargs)
        return func(*args, **kwargs)


def max_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """Apply F.max_pool2d to integers in uint8, which torch's kernel refuses for large images.

    Args:
        x: Integers [..., C, H, W].
        kernel_size: The size of a window.
        stride: The step from one window to the next; None for `kernel_size`.
        padding: The number of padded pixels on each side.
        dilation: The step from one element of a window to the next.
        ceil_mode: Whether windows may reach over the border.
        return_indices: Must be False.

    Examples:
        >>> x = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
        >>> max_pool(x, 2).flatten().tolist()
        [5, 7, 13, 15]
    """
    sides = [kernel_size, kernel_size if stride is None or stride == [] else stride]
    kernel, step, pad, dilate = (_pair(each) for each in (*sides, padding, dilation))
    shape = _pooled_shape(tuple(x.shape), kernel, step, pad, dilate, ceil_mode)
    for dim in (-2, -1):
        size, count = x.shape[dim], shape[dim]
        reach = (count - 1) * step[dim] + dilate[dim] * (kernel[dim] - 1) + 1
        after = max(0, reach - size - pad[dim])
        if pad[dim] or after:  # 0 is the smallest integer, and no window has only padding
            ends = (pad[dim], after) if dim == -1 else (0, 0, pad[dim], after)
            x = F.pad(x, ends)
        starts = [dilate[dim] * place for place in range(kernel[dim])]
        length = (count - 1) * step[dim] + 1
        parts = [_strided(x, dim, start, length, step[dim]) for start in starts]
        x = parts[0]
        for part in parts[1:]:
            x = torch.maximum(x, part)
    return x


@functools.lru_cache(maxsize=1024)
def _pooled_shape(shape: tuple[int, ...], *options: Any) -> tuple[int, ...]:
    """Return the last dimensions of the result, by torch's rules for windows over the border."""
    return tuple(F.max_pool2d(torch.empty(shape, device="meta"), *options).shape[-2:])


def _strided(x: Tensor, dim: int, start: int, length: int, step: int) -> Tensor:
    window = slice(start, start + length, step)
    return x[..., window, :] if dim == -2 else x[..., window]


def _pair(sizes: Any) -> tuple[int, int]:
    if isinstance(sizes, int):
        return sizes, sizes
    return (sizes[0], sizes[-1])


class PlainEngine(LayerEngine):
    """Base class of engines whose activations are `PlainIntegers`."""

    def can_be_wrong(self, layer: Layer, weight_bits: int, activation_bits: int) -> bool:
        return False

    def quantize(self, x: Tensor, grid: ActivationGrid) -> Tensor:
        steps = (x * (1 / x.new_tensor(grid.scale))).round_().add_(grid.zero_point)
        integers = steps.clamp_(0, grid.quant_max).to(torch.uint8)
        return self.wrap(integers, grid.scale, grid.zero_point)

    def wrap(self, integers: Tensor, scale: float, zero_point: int) -> Tensor:
        return PlainIntegers.of(integers, Grid(scale, zero_point, 255))

    def holds(self, x: Any) -> bool:
        return isinstance(x, PlainIntegers)

    def integers(self, x: Tensor) -> Tensor:
        return plain(x)

    def grid(self, x: Tensor) -> tuple[float, int]:
        assert isinstance(x, PlainIntegers)
        return x.grid.scale, x.grid.zero_point

    def dequantize(self, x: Tensor) -> Tensor:
        return rounding.from_integers(self.centered(x), self.grid(x)[0])

    def add(self, x: Tensor, y: Tensor, output: ActivationGrid, relu: bool) -> Tensor:
        scale, zero_point, quant_max = output
        (s_x, z_x), (s_y, z_y) = self.grid(x), self.grid(y)
        low = 0 if relu else -zero_point
        a, b = torch.broadcast_tensors(plain(x), plain(y))
        if not is_dense(a):
            a = a.contiguous()
        if a.stride() != b.stride():
            b = torch.empty_like(a).copy_(b)
        out = torch.empty_like(a)
        flat = [_in_memory_order(each) for each in (a, b, out)]
        for first, second, target in zip(*(each.split(CHUNK) for each in flat), strict=True):
            summands = (first.float().sub_(z_x), s_x, z_x), (second.float().sub_(z_y), s_y, z_y)
            steps = rounding.plain_sum(*summands, scale)
            target.copy_(steps.clamp_(low, quant_max - zero_point).add_(zero_point))
        return self.wrap(out, scale, zero_point)


def _in_memory_order(x: Tensor) -> Tensor:
    return x.as_strided((x.numel(),), (1,))
