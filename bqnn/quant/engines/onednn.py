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
CONVOLUTIONS = ("qconv_pointwise", "qconv2d_pointwise")  # upstream has renamed it


def make(name: str) -> LayerEngine:
    """Return the engine."""
    return OneDnn()


class OneDnn(PlainEngine):
    """torch.ops.onednn on plain integers."""

    name = "onednn"

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


class PackedWeight:
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
        assert isinstance(x, PlainIntegers)
        geometry, bias = self.weight.geometry, self.weight.bias
        scale, zero_point = x.grid.scale, x.grid.zero_point
        rows = in_batch(plain(x), geometry is not None)
        inputs = (rows, scale, zero_point, self._pack(rows, x.grid), self._scale, self._zero_point)
        activation = "relu" if relu else "none"
        outputs: Any = (output.scale, output.zero_point, torch.uint8, activation, [], "")
        if geometry is None:
            out = torch.ops.onednn.qlinear_pointwise(*inputs, bias, *outputs)
            out = out if x.dim() == 2 else out.reshape(*x.shape[:-1], out.shape[-1])
        else:
            out = _convolution()(*inputs, bias, *map(list, geometry[:3]), geometry[3], *outputs)
        if output.quant_max < 255:
            out.clamp_(max=output.quant_max)
        return PlainIntegers.of(out, Grid(output.scale, output.zero_point, 255))

    def _pack(self, rows: Tensor, grid: Grid) -> Tensor:
        key = (grid.zero_point != 0, rows.shape[1:])
        found = self._packed.get(key)
        if found is None:
            integers, geometry = self.weight.integers, self.weight.geometry
            if geometry is None:
                found = torch.ops.onednn.qlinear_prepack(integers, None)
            else:
                found = torch.ops.onednn.qconv_prepack(
                    integers,
                    self._scale,
                    grid.scale,
                    grid.zero_point,
                    *map(list, geometry[:3]),
                    geometry[3],
                    list(rows.shape),
                )
            self._packed[key] = found
        return found


def _convolution() -> Any:
    """Return the operator of a convolution under the name that this version of torch has."""
    found = (getattr(torch.ops.onednn, name, None) for name in CONVOLUTIONS)
    return next((operator for operator in found if operator is not None), None)
