"""The engine reference: exact sums of integers in floats, by core operators, on any device.

It is right everywhere, never saturates, and takes the time of a float network. Other engines are
tested against it, and it executes the layers in which their sums could saturate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bqnn.quant.engines.contract import ActivationGrid, Layer, LayerEngine, Packed, Weight, in_batch
from bqnn.quant.engines.plain import PlainEngine
from bqnn.quant.engines.rounding import Rounding, exact_sums, requantize


def make(name: str) -> LayerEngine:
    """Return the engine."""
    return Reference()


class Reference(PlainEngine):
    """Exact sums, rounded as fbgemm rounds them."""

    name = "reference"

    def rounding(self, layer: Layer, inputs: Sequence[int]) -> Rounding:
        return "fbgemm"

    def pack(self, weight: Weight) -> Packed:
        return ExactLayer(weight, self)


@dataclass
class ExactLayer(Packed):
    """A layer that sums products exactly.

    Args:
        weight: The integer weights.
        engine: The engine whose activations it takes and returns.
    """

    weight: Weight
    engine: LayerEngine

    def __call__(self, x: Tensor, relu: bool, output: ActivationGrid) -> Tensor:
        scale, zero_point = self.engine.grid(x)
        geometry = self.weight.geometry
        rows = in_batch(self.engine.integers(x), geometry is not None).float().sub_(zero_point)
        sums = exact_sums(rows, self.weight.centered, geometry, max(zero_point, 255 - zero_point))
        steps = requantize(
            sums,
            scale,
            self.weight.scale,
            self.weight.bias,
            output,
            relu=relu,
            rounding="fbgemm",
        )
        integers = steps.add_(output.zero_point).to(torch.uint8)
        if x.dim() != integers.dim():
            integers = integers.reshape(*x.shape[:-1], integers.shape[-1])
        return self.engine.wrap(integers, output.scale, output.zero_point)
