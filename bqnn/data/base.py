"""TensorData: the base class of data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytorch_lightning import LightningDataModule
from torch import Tensor

from bqnn.arguments import ArgumentError
from bqnn.data.loader import TensorLoader, permutation
from bqnn.seeds import Stream, stream_seed


@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs [N, ...] and the target of each [N]."""

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"{len(self.inputs)} inputs and {len(self.targets)} targets: every row needs "
                "both; a data file is probably cut short, fetch it again"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Tensor) -> Rows:
        """Return a copy of the selected rows."""
        return Rows(self.inputs[rows], self.targets[rows])


class TensorData(LightningDataModule):
    """A data set in memory: `train`, `val` and `test` rows after `prepare_data` and `setup`.

    Validation rows are taken out of the training part by an order that depends on `seed` alone;
    with `validation_share` 0 there are none and `val` is None. Batches are augmented while
    training, then normalized, on the device that they were moved to.
    """

    train: Rows
    val: Rows | None
    test: Rows

    def __init__(
        self, *, data_dir: str, seed: int, batch_size: int, validation_share: float
    ) -> None:
        super().__init__()
        if not 0 <= validation_share < 1:
            raise ArgumentError(
                f"validation_share={validation_share}: it is the part of the training rows that "
                "is held out; choose 0 or more and less than 1",
                "validation_share",
            )
        self.data_dir = Path(data_dir).expanduser()
        self.seed = seed
        self.batch_size = batch_size
        self.validation_share = validation_share
        self.order = Stream.ORDER  # of the training rows
        self.is_set_up = False

    def setup(self, stage: str | None = None) -> None:
        """Read the data and hold out the validation rows; later calls change nothing."""
        if self.is_set_up:
            return
        self.train, self.val, self.test = self._arrange(*self._read())
        self.is_set_up = True

    def facts(self) -> dict[str, object]:
        """Return the facts that are needed to rebuild a model without the data, in JSON types."""
        raise NotImplementedError

    def normalize(self, inputs: Tensor) -> Tensor:
        """Normalize inputs for the network."""
        return inputs

    def augment(self, inputs: Tensor) -> Tensor:
        """Augment each input at random, with torch's global generator."""
        return inputs

    def train_dataloader(self) -> TensorLoader:
        """Shuffled batches of the training rows; with several devices, this rank's part."""
        return TensorLoader(
            self.train.inputs,
            self.train.targets,
            self.batch_size,
            shuffle=True,
            seed=self.seed,
            stream=self.order,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )

    def val_dataloader(self) -> TensorLoader | list[TensorLoader]:
        """All validation rows as one batch, on every rank, or an empty list."""
        return [] if self.val is None else _whole(self.val)

    def test_dataloader(self) -> TensorLoader:
        """All test rows as one batch, on every rank."""
        return _whole(self.test)

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Lightning hook: normalize, and augment in training."""
        inputs, targets = batch
        if self.trainer is not None and self.trainer.training:
            inputs = self.augment(inputs)
        return self.normalize(inputs), targets

    def _read(self) -> tuple[Rows, Rows]:
        """The training part, validation rows still inside, and the test part."""
        raise NotImplementedError

    def _arrange(self, part: Rows, test: Rows) -> tuple[Rows, Rows | None, Rows]:
        if self.validation_share == 0:
            return part, None, test
        num_val = max(1, round(self.validation_share * len(part)))
        if num_val >= len(part):
            raise ArgumentError(
                f"validation_share={self.validation_share}: it would hold out all {len(part)} "
                "training rows; choose a smaller share, or 0",
                "validation_share",
            )
        order = permutation(len(part), stream_seed(self.seed, Stream.VALIDATION_SPLIT))
        # Sorted, so that the rows keep the order of the file.
        held_out, kept = order[:num_val].sort().values, order[num_val:].sort().values
        return part.take(kept), part.take(held_out), test


def _whole(rows: Rows) -> TensorLoader:
    return TensorLoader(rows.inputs, rows.targets, batch_size=len(rows))
