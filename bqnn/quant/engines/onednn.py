"""The engine onednn: torch's operators of oneDNN on plain integers.

They take and return uint8 tensors, and no quantized tensor is made.
"""

from collections.abc import Sequence
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
)
from bqnn.quant.engines.plain import PlainEngine, PlainIntegers
from bqnn.quant.engines.rounding import Rounding
from bqnn.quant.grids import Grid, plain

OPERATORS = ("qconv_prepack", "qlinear_prepack", "qlinear_pointwise")
CONVOLUTIONS = ("qconv2d_pointwise", "qconv_pointwise")  # upstream has renamed it


def make(name: str) -> LayerEngine:
    """Return the engine."""
    return OneDnn()


class OneDnn(PlainEngine):
    """torch.ops.onednn on plain integers."""

    name = "onednn"
    adds_within_layers = True

    def missing(self) -> str | None:
        if not torch.backends.mkldnn.is_available():
            return "this build of torch lacks oneDNN"
        names = [*OPERATORS, *(() if _convolution() else CONVOLUTIONS[:1])]
        lacking = [name for name in names if not hasattr(torch.ops.onednn, name)]
        if lacking:
            return f"this version of torch has no operator onednn::{lacking[0]}"
        return None

    def rounding(self, layer: Layer, inputs: Sequence[int]) -> Rounding:
        return measure.rounding_of(self, layer, inputs, ("onednn", "onednn_product"))

    def can_be_wrong(self, layer: Layer, weight_bits: int, activation_bits: int) -> bool:
        is_wrong = measure.pads_whole_windows(layer)
        return is_wrong or measure.saturates(self, layer, weight_bits, activation_bits)

    def pack(self, weight: Weight) -> Packed:
        return PackedWeight(weight)


class PackedWeight(Packed):
    """Integer weights that are packed when the first inputs show their shape and zero point.

    Args:
        weight: The weights.
    """

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        count = weight.integers.shape[0]
        self._scale = weight.scale.float().expand(count).contiguous()
        self._zero_point = torch.zeros(count, dtype=torch.int64, device="cpu")
        self._packed: dict[Any, Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the weights unpacked: a packed form belongs to a CPU."""
        return PackedWeight, (self.weight,)

    def __call__(self, x: Tensor, relu: bool, output: ActivationGrid) -> Tensor:
        inputs, bias = self._inputs(x), self.weight.bias
        # The kernel clamps its floats, and rounds them to the ends of the grid.
        low, high = -1 - output.zero_point, output.quant_max - output.zero_point
        ends = [0.0 if relu else low * output.scale, high * output.scale]
        outputs: Any = (output.scale, output.zero_point, torch.uint8, "hardtanh", ends, "")
        if self.weight.geometry is None:
            out = torch.ops.onednn.qlinear_pointwise(*inputs, bias, *outputs)
        else:
            out = _convolution()(*inputs, bias, *self._geometry, *outputs)
        return _on_grid(out, x, output)

    def add(self, x: Tensor, other: Tensor, relu: bool, output: ActivationGrid) -> Tensor:
        assert isinstance(other, PlainIntegers)
        if other.numel() == 0:  # which the kernel refuses
            return self(x, relu, output)
        inputs, bias = self._inputs(x), self.weight.bias
        grid = (output.scale, output.zero_point, torch.uint8, other.grid.scale)
        outputs: Any = (*grid, other.grid.zero_point, "sum", 1.0, "relu" if relu else "none")
        summand = plain(other)
        # The kernel may write its outputs in place of the other activations.
        if self.weight.geometry is None:
            summand = summand.reshape(-1, summand.shape[-1])
            summand = summand.clone(memory_format=torch.contiguous_format)
            run = torch.ops.onednn.qlinear_pointwise.binary
            out = run(*inputs, summand, bias, *outputs, [], "")
        else:
            summand = summand.clone(memory_format=torch.channels_last)
            run = _convolution().binary
            out = run(*inputs, summand, bias, *self._geometry, *outputs, [], "")
        if output.quant_max < 255:  # a sum takes no other activation than ReLU
            out.clamp_(max=output.quant_max)
        return _on_grid(out, x, output)

    @property
    def _geometry(self) -> tuple[Any, ...]:
        geometry = self.weight.geometry
        assert geometry is not None
        return (*map(list, geometry[:3]), geometry.groups)

    def _inputs(self, x: Tensor) -> tuple[Any, ...]:
        """Return the first arguments of an operator: inputs and weights with their grids."""
        assert isinstance(x, PlainIntegers)
        rows = in_batch(plain(x), self.weight.geometry is not None)
        grid = (x.grid.scale, x.grid.zero_point)
        return (rows, *grid, self._pack(rows, x.grid), self._scale, self._zero_point)

    def _pack(self, rows: Tensor, grid: Grid) -> Tensor:
        key = (grid.zero_point != 0, rows.shape[1:])
        found = self._packed.get(key)
        if found is None:
            integers, geometry = self.weight.integers, self.weight.geometry
            if geometry is None:
                found = torch.ops.onednn.qlinear_prepack(integers, list(rows.shape))
            else:
                found = torch.ops.onednn.qconv_prepack(
                    integers,
                    self._scale,
                    grid.scale,
                    grid.zero_point,
                    *self._geometry,
                    list(rows.shape),
                )
            self._packed[key] = found
        return found


def _on_grid(out: Tensor, x: Tensor, output: ActivationGrid) -> Tensor:
    """Return outputs as activations, with the leading dimensions of the inputs."""
    if out.dim() != x.dim():
        out = out.reshape(*x.shape[:-1], out.shape[-1])
    return PlainIntegers.of(out, Grid(output.scale, output.zero_point, 255))


def _convolution() -> Any:
    """Return the operator of a convolution under the name that this version of torch has."""
    found = (getattr(torch.ops.onednn, name, None) for name in CONVOLUTIONS)
    return next((operator for operator in found if operator is not None), None)
