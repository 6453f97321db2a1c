"""TensorData: the base class of data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from bqnn.arguments import ArgumentError
from bqnn.data.loader import TensorLoader, permutation
from bqnn.data.normalization import Normalization
from bqnn.seeds import Stream, stream_seed

LARGEST_SHARE = 0.25  # of the free memory of a GPU, for a copy of the rows


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a data set.

    Args:
        inputs: Inputs [N, ...].
        targets: Targets [N].

    Raises:
        ValueError: The numbers of inputs and targets differ.

    Examples:
        >>> import torch
        >>> rows = Rows(torch.zeros(5, 3), torch.arange(5))
        >>> rows.take(torch.tensor([4, 0])).targets
        tensor([4, 0])
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"{len(self.inputs)} inputs and {len(self.targets)} targets: each row needs "
                "both; a data file may be truncated, download it again"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Tensor) -> Rows:
        """Return a copy of the rows with these indices or this mask."""
        return Rows(self.inputs[rows], self.targets[rows])

    def to(self, device: torch.device) -> Rows:
        """Return the rows on a device."""
        return Rows(self.inputs.to(device), self.targets.to(device))


class TensorData(LightningDataModule):
    """Base class for data sets in memory.

    After `prepare_data` and `setup`, the rows are in `train`, `val` and `test`. Validation rows
    are split off the training rows at random. Batches are augmented (in training) and normalized
    on the device of the model. Subclasses implement `_read` and `facts`.

    Args:
        data_dir: The folder of data files.
        seed: Seed of the validation split and of the order of training batches.
        batch_size: The number of rows in a training batch.
        validation_share: The share of training rows for validation, in [0, 1). If it is 0, `val`
            is None.

    Attributes:
        on_device: Whether a Trainer on a GPU gets batches from a copy of the rows in the memory of
            the GPU, if the rows take at most a quarter of what is free. Batches are the same.

    Examples:
        >>> from bqnn.data.synthetic import SyntheticData
        >>> data = SyntheticData(num_train=100, batch_size=16)
        >>> data.setup()
        >>> len(data.train), len(data.val), len(data.test)
        (80, 20, 200)
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, targets.shape
        (torch.Size([16, 1]), torch.Size([16]))
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
                f"validation_share={validation_share}: it is the share of training rows for "
                "validation; choose 0 or more and less than 1",
                "validation_share",
            )
        self.data_dir = Path(data_dir).expanduser()
        self.seed = seed
        self.batch_size = batch_size
        self.validation_share = validation_share
        self.order = Stream.ORDER  # the random stream of the order of training rows
        self.is_set_up = False
        self.on_device = True
        self._copies: dict[Rows, Rows] = {}  # on the device of the Trainer, by the original

    def check_source(self) -> None:
        """Refuse a missing file or folder, or one without what the options name.

        It is called before a training writes anything, and must not read the rows.
        """

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data. Further calls have no effect."""
        if self.is_set_up:
            return
        self.train, self.val, self.test = self._arrange(*self._read())
        self.is_set_up = True

    @property
    def tested_share(self) -> float:
        """The share of all rows that are test rows, after `setup`."""
        num_val = 0 if self.val is None else len(self.val)
        return len(self.test) / (len(self.train) + num_val + len(self.test))

    def facts(self) -> dict[str, object]:
        """Return the facts from which a model is rebuilt without the data, in JSON types.

        `bqnn.checkpoints.schema.FACTS` lists them. Those of `Normalization.facts` let a loaded
        model predict rows in the units of the data.
        """
        raise NotImplementedError

    def recipe_facts(self) -> dict[str, object]:
        """Return `facts` with a normalization, if the data set has none.

        A loaded model then predicts rows as `_read` returns them. A subclass that normalizes inputs
        has its own `input_mean` and `input_std` among its facts.
        """
        facts = self.facts()
        shape = facts.get("input_shape")
        is_plain = (
            type(self).normalize is TensorData.normalize
            and type(self)._arrange is TensorData._arrange
        )
        if not is_plain or not isinstance(shape, list) or not shape:
            return facts
        identity = Normalization([0.0] * shape[0], [1.0] * shape[0])
        return facts if {"input_mean", "input_std"} & facts.keys() else identity.facts() | facts

    def normalize(self, inputs: Tensor) -> Tensor:
        """Normalize inputs for the network."""
        return inputs

    def augment(self, inputs: Tensor) -> Tensor:
        """Augment each input at random, with torch's global generator."""
        return inputs

    def train_dataloader(self) -> TensorLoader:
        """Return shuffled batches of the training rows, or of this rank's share of them."""
        rows = self._placed(self.train)
        return TensorLoader(
            rows.inputs,
            rows.targets,
            self.batch_size,
            shuffle=True,
            seed=self.seed,
            stream=self.order,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )

    def val_dataloader(self) -> TensorLoader | list[TensorLoader]:
        """Return all validation rows as one batch, on every rank, or an empty list."""
        return [] if self.val is None else _whole(self._placed(self.val))

    def test_dataloader(self) -> TensorLoader:
        """Return all test rows as one batch, on every rank."""
        return _whole(self.test)

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Lightning hook: normalize, and augment in training."""
        inputs, targets = batch
        if self.trainer is not None and self.trainer.training:
            inputs = self.augment(inputs)
        return self.normalize(inputs), targets

    def teardown(self, stage: str) -> None:
        """Lightning hook: free the memory of the device."""
        self._copies.clear()

    def _placed(self, rows: Rows) -> Rows:
        """Return the rows on the device of the Trainer, or unchanged if they shall stay here."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if device.type != "cuda" or not self.on_device:
            return rows
        if rows not in self._copies:
            free, _ = torch.cuda.mem_get_info(device)
            if rows.inputs.nbytes + rows.targets.nbytes > LARGEST_SHARE * free:
                return rows
            self._copies[rows] = rows.to(device)
        return self._copies[rows]

    def _read(self) -> tuple[Rows, Rows]:
        """Read the training rows, including validation rows, and the test rows."""
        raise NotImplementedError

    def _arrange(self, part: Rows, test: Rows) -> tuple[Rows, Rows | None, Rows]:
        if self.validation_share == 0:
            return part, None, test
        num_val = max(1, round(self.validation_share * len(part)))
        if num_val >= len(part):
            raise ArgumentError(
                f"validation_share={self.validation_share}: it leaves none of the {len(part)} rows "
                "for training; choose a smaller share, or 0",
                "validation_share",
            )
        order = permutation(len(part), stream_seed(self.seed, Stream.VALIDATION_SPLIT))
        # Sorting keeps the rows in the order of the file.
        held_out, kept = order[:num_val].sort().values, order[num_val:].sort().values
        return part.take(kept), part.take(held_out), test


def _whole(rows: Rows) -> TensorLoader:
    return TensorLoader(rows.inputs, rows.targets, batch_size=len(rows))
