"""Random data sets with the shapes of real ones. Random content does not change the time."""

from typing import Any

import torch

from bqnn.data import Rows
from bqnn.data.images import ImageData
from bqnn.data.tables import TableData


class RandomImages(ImageData):
    """Images [num_images, C, H, W] in uint8, by default as in MNIST.

    Training and test rows are the same.
    """

    def __init__(
        self, num_images: int, shape: tuple[int, int, int] = (1, 28, 28), **options: Any
    ) -> None:
        defaults = {"data_dir": "", "seed": 0, "validation_share": 0.0, "batch_size": 256}
        super().__init__(**{**defaults, **options})
        self.num_images = num_images
        self.shape = shape
        self.class_names = [str(digit) for digit in range(10)]

    def _read(self) -> tuple[Rows, Rows]:
        inputs = torch.randint(256, (self.num_images, *self.shape), dtype=torch.uint8)
        rows = Rows(inputs, torch.randint(10, (self.num_images,)))
        return rows, rows


class RandomTable(TableData):
    """A table [rows, features]. Training and test rows are the same."""

    def __init__(self, shape: tuple[int, int], **options: Any) -> None:
        super().__init__(**{"data_dir": "", "seed": 0, "validation_share": 0.0, **options})
        self.shape = shape

    def _read(self) -> tuple[Rows, Rows]:
        inputs = torch.randn(self.shape, dtype=torch.float64)
        rows = Rows(inputs, inputs.sum(1))
        return rows, rows
