"""The terms of the loss of each batch, and their means over an epoch."""

from collections import defaultdict
from typing import Protocol

import torch
from torch import Tensor

Terms = dict[str, Tensor | float]
Gradients = list[tuple[Tensor, Tensor]]  # parameters with their gradients


class CompiledTerms(Protocol):
    """A compiled replacement of `Method.loss_terms`.

    Attributes:
        gradients: Each parameter with its gradient of the last loss, if the backward pass is done.
    """

    gradients: Gradients | None

    def __call__(self, inputs: Tensor, targets: Tensor) -> Terms:
        """Return the terms of the loss of a batch."""
        ...


class EpochTerms:
    """The terms of the loss in each batch of an epoch.

    Attributes:
        rows: The number of rows of each batch.

    Examples:
        >>> epoch = EpochTerms()
        >>> epoch.record({"loss": 1.0}, num_rows=3)
        >>> epoch.record({"loss": 5.0}, num_rows=1)
        >>> epoch.names, epoch.means()
        (['loss'], tensor([2.], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._values: defaultdict[str, list[Tensor]] = defaultdict(list)

    def clear(self) -> None:
        """Start a new epoch."""
        self.rows.clear()
        self._values.clear()

    def record(self, terms: Terms, num_rows: int) -> None:
        """Add the terms of a batch. Values stay on their device, to avoid a synchronization."""
        for name, value in terms.items():
            self._values[name].append(torch.as_tensor(value).detach())
        self.rows.append(num_rows)

    @property
    def names(self) -> list[str]:
        """The names of the terms."""
        return list(self._values)

    @property
    def losses(self) -> list[Tensor]:
        """The term `loss` of each batch."""
        return self._values["loss"]

    def means(self) -> Tensor:
        """Return the mean of each term over the rows of the epoch: [T] in float64, on the CPU."""
        rows = torch.tensor(self.rows, dtype=torch.float64)
        values = [torch.stack(value).cpu().double() for value in self._values.values()]
        return torch.stack(values) @ rows / rows.sum()
