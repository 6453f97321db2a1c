"""TensorLoader: batches of tensors in memory, selected by index."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor

from bqnn.arguments import ArgumentError
from bqnn.seeds import Stream, stream_seed


class TensorLoader:
    """Dataloader of tensors in memory; each batch is `(inputs[rows], targets[rows])`.

    A shuffled order depends only on (seed, stream, epoch). Without shuffling, batches are views.
    With several ranks, all ranks use the same order, and each takes its part of every global batch
    of `batch_size * world_size` rows. All ranks get the same number of rows: if the division has a
    remainder, the first rows are repeated at the end.

    Args:
        inputs: Inputs [N, ...].
        targets: Targets [N, ...].
        batch_size: The number of rows in a batch.
        shuffle: Whether to shuffle in every epoch.
        seed: The seed of the run.
        stream: The random stream of the order.
        rank: The rank of this process.
        world_size: The number of ranks.

    Raises:
        ValueError: The lengths differ, there are no rows, `batch_size` is below 1, or `rank` is
            invalid.

    Examples:
        >>> loader = TensorLoader(torch.arange(5), torch.zeros(5), batch_size=2)
        >>> [inputs.tolist() for inputs, _ in loader]
        [[0, 1], [2, 3], [4]]
    """

    batch_sampler: None = None  # Lightning reads it from every loader with a sampler

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        stream: Stream = Stream.ORDER,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(
                f"inputs have {len(inputs)} rows and targets {len(targets)}: each row needs both; "
                "pass equal numbers"
            )
        if len(inputs) == 0:
            raise ValueError("inputs have 0 rows: a batch needs rows; pass at least one row")
        if batch_size < 1:
            raise ArgumentError(
                f"batch_size={batch_size}: a batch needs at least one row; choose 1 or more",
                "batch_size",
            )
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank={rank} with world_size={world_size}: ranks count from 0; "
                f"choose 0 to {world_size - 1}"
            )
        self.inputs = inputs
        self.targets = targets
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.stream = stream
        self.epoch = 0
        self.rank = rank
        self.world_size = world_size

    @property
    def sampler(self) -> TensorLoader:
        """The object on which Lightning calls `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which selects the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return ceil(ceil(len(self.inputs) / self.world_size) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.shuffle and self.world_size == 1:
            yield from zip(
                torch.split(self.inputs, self.batch_size),
                torch.split(self.targets, self.batch_size),
                strict=True,
            )
            return
        for rows in torch.split(self._rows(), self.batch_size):
            yield self.inputs.index_select(0, rows), self.targets.index_select(0, rows)

    def _rows(self) -> Tensor:
        num_rows = len(self.inputs)
        if self.shuffle:
            order = permutation(num_rows, stream_seed(self.seed, self.stream, self.epoch))
        else:
            order = torch.arange(num_rows)
        if self.world_size > 1:
            wrapped = torch.arange(ceil(num_rows / self.world_size) * self.world_size) % num_rows
            order = order[wrapped[self.rank :: self.world_size]]
        return order.to(self.inputs.device)


def permutation(num_rows: int, seed: int) -> Tensor:
    """Return a random permutation of `range(num_rows)` in int64 [N], which depends only on `seed`.

    Examples:
        >>> permutation(4, seed=0).sort().values
        tensor([0, 1, 2, 3])
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(num_rows, generator=generator, device="cpu")
