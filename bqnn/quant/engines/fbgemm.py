"""The engines fbgemm and x86, on torch's quantized tensors.

Only this module of the package uses torch.ops.quantized and quantized tensors, which upstream has
deprecated. If torch drops them, these two engines are missing, and nothing else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from bqnn.quant.engines import measure
from bqnn.quant.engines.contract import (
    ActivationGrid,
    Layer,
    LayerEngine,
    Packed,
    Weight,
    in_batch,
    is_dense,
    layout,
)
from bqnn.quant.engines.rounding import Rounding

_packing = Lock()  # the engine is a process-wide setting of torch


def make(name: str) -> LayerEngine:
    """Return fbgemm or x86."""
    return QuantizedTensors(name)


class QuantizedTensors(LayerEngine):
    """An engine of torch.ops.quantized.

    Args:
        name: fbgemm or x86.
    """

    fuses_sums = True

    def __init__(self, name: str) -> None:
        self.name = name

    def missing(self) -> str | None:
        if self.name not in torch.backends.quantized.supported_engines:
            return "this build of torch lacks it"
        if not all(hasattr(torch.ops.quantized, name) for name in ("conv2d_prepack", "linear")):
            return "this version of torch has no operators on quantized tensors"
        return None

    def rounding(self, layer: Layer, inputs: Sequence[int]) -> Rounding:
        fused: tuple[Rounding, ...] = ("fbgemm",)
        if layer.has_bias and not layer.per_channel:
            fused = ("fbgemm_fused", "fbgemm_inverse")
        onednn: tuple[Rounding, ...] = ("onednn_inverse", "onednn_inverse_product")
        candidates = fused if self.name == "fbgemm" else (*onednn, *fused)
        return measure.rounding_of(self, layer, inputs, candidates)

    def can_be_wrong(self, layer: Layer, weight_bits: int, activation_bits: int) -> bool:
        is_wrong = self.name == "x86" and measure.pads_whole_windows(layer)
        return is_wrong or measure.saturates(self, layer, weight_bits, activation_bits)

    def pack(self, weight: Weight) -> Packed:
        integers = weight.integers.contiguous()
        if weight.scale.numel() == 1:
            quantized = torch._make_per_tensor_quantized_tensor(
                integers, float(weight.scale), int(weight.zero_point)
            )
        else:
            quantized = torch._make_per_channel_quantized_tensor(
                integers, weight.scale.double(), weight.zero_point.long(), 0
            )
        return PackedWeight(quantized, weight.bias, weight.geometry, self.name)

    def quantize(self, x: Tensor, grid: ActivationGrid) -> Tensor:
        out = torch.quantize_per_tensor(x, grid.scale, grid.zero_point, torch.quint8)
        return clamped(out, grid)

    def wrap(self, integers: Tensor, scale: float, zero_point: int) -> Tensor:
        return torch._make_per_tensor_quantized_tensor(integers, scale, zero_point)

    def holds(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.is_quantized

    def integers(self, x: Tensor) -> Tensor:
        return x.int_repr()

    def grid(self, x: Tensor) -> tuple[float, int]:
        return x.q_scale(), x.q_zero_point()

    def dequantize(self, x: Tensor) -> Tensor:
        return x.dequantize()

    def add(self, x: Tensor, y: Tensor, output: ActivationGrid, relu: bool) -> Tensor:
        run = torch.ops.quantized.add_relu if relu else torch.ops.quantized.add
        return clamped(run(*_alike(x, y), output.scale, output.zero_point), output)

    def moved(self, x: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        return self.wrap(move(_memory(x)), *self.grid(x))

    def keep(self, x: Tensor, kept: Tensor, factor: float) -> Tensor:
        zero_point = x.q_zero_point()
        out = torch._empty_affine_quantized(
            x.shape,
            scale=x.q_scale() * factor,
            zero_point=zero_point,
            dtype=torch.quint8,
            memory_format=layout(x),
        )
        source, target = _memory(x), _memory(out)
        if zero_point == 0:
            torch.mul(source, kept, out=target)
        else:  # uint8 arithmetic wraps modulo 256, which cancels in the two shifts
            torch.sub(source, zero_point, out=target).mul_(kept).add_(zero_point)
        return out


class PackedWeight(Packed):
    """Integer weights and a float bias, packed for an engine.

    Args:
        weight: Weights as a quantized tensor.
        bias: Bias [C], or None.
        geometry: Geometry of the convolution; None for a linear layer.
        engine: fbgemm or x86.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Any, engine: str) -> None:
        ops = torch.ops.quantized
        self._geometry, self._engine = geometry, engine
        self._is_conv = geometry is not None
        with _using(engine):
            if geometry is None:
                self._packed = ops.linear_prepack(weight, bias)
            else:
                self._packed = ops.conv2d_prepack(weight, bias, *geometry)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the weights unpacked, because torch would pack them for its current engine."""
        ops = torch.ops.quantized
        weight, bias = (ops.conv2d_unpack if self._is_conv else ops.linear_unpack)(self._packed)
        if weight.qscheme() == torch.per_tensor_affine:
            scale = torch.tensor([weight.q_scale()], device="cpu")
            zero_point = torch.tensor([weight.q_zero_point()], device="cpu")
        else:
            scale = weight.q_per_channel_scales().float()
            zero_point = weight.q_per_channel_zero_points()
        unpacked = Weight(weight.int_repr(), scale, zero_point, bias, self._geometry)
        return _pack, (self._engine, unpacked)

    def __call__(self, x: Tensor, relu: bool, output: ActivationGrid) -> Tensor:
        ops = torch.ops.quantized
        if self._is_conv:
            run = ops.conv2d_relu if relu else ops.conv2d
        else:
            run = ops.linear_relu if relu else ops.linear
        out = run(in_batch(x, self._is_conv), self._packed, output.scale, output.zero_point)
        if self._is_conv and len(out) == 1:
            # A view of one row can have strides that torch's max pool of integers reads wrongly.
            out = out.contiguous()
        out = out if x.dim() == out.dim() else out.reshape(*x.shape[:-1], out.shape[-1])
        return clamped(out, output)


def _pack(engine: str, weight: Weight) -> Packed:
    return make(engine).pack(weight)


def clamped(x: Tensor, grid: ActivationGrid) -> Tensor:
    """Clamp a quantized tensor in place to the bits of its grid; operators use all 8 bits."""
    if grid.quant_max < 255:
        _memory(x).clamp_(max=grid.quant_max)
    return x


def _alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return summands in one shape and layout; torch rounds some ties of others differently."""
    if x.shape != y.shape:
        shape = torch.broadcast_shapes(x.shape, y.shape)
        x, y = x.expand(shape), y.expand(shape)
    x = x if is_dense(x) else x.contiguous()
    return x, y if y.stride() == x.stride() else y.contiguous(memory_format=layout(x))


def _memory(x: Tensor) -> Tensor:
    """View the memory of a quantized tensor as uint8; `int_repr` would copy it."""
    view = torch.empty(0, dtype=torch.uint8)
    return view.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


@contextmanager
def _using(engine: str) -> Iterator[None]:
    """Set torch's engine while weights are packed; running packed weights does not need it.

    The setting is process-wide, so only one thread packs at a time.
    """
    with _packing:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            yield
        finally:
            torch.backends.quantized.engine = before
