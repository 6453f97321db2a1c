"""Values: what a node of a network is in the file."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from bqnn.quant.engines.contract import ActivationGrid
from bqnn.quant.postponed import Postponed


@dataclass(frozen=True, eq=False)
class Value:
    """An activation: its name in the file, and what the simulation has at that place.

    Attributes:
        name: The name in the file, of uint8 integers on a grid, or of float32 numbers.
        example: The activation in the simulation for a few rows, with its shape and grid.
        integers: The grid, or None for floats.
        steps: The step of the grid that each float of a row comes from, shaped like the row; None
            before the integers.
        postponed: A layer that reads the value and runs within the sum after it, or None.
    """

    name: str
    example: Tensor
    integers: ActivationGrid | None = None
    steps: Tensor | None = None
    postponed: Postponed | None = None

    def moved(self, name: str, example: Tensor, steps: Tensor | None = None) -> Self:
        """Return the value after an operation that moves or selects elements.

        Args:
            name: The name of the output in the file.
            example: The output in the simulation.
            steps: The step of each float of a row of the output.
        """
        return replace(self, name=name, example=example, steps=steps)


def row_of(x: Tensor, step: float) -> Tensor:
    """Return the step of each element of a row of `x`.

    Args:
        x: An activation [N, ...].
        step: The step of all its elements.

    Examples:
        >>> row_of(torch.zeros(5, 2), step=0.5)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    return torch.full(x.shape[1:], step, dtype=torch.float64)
