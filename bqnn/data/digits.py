"""DigitsData: the 1,797 handwritten digits of 8x8 pixels in scikit-learn."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bqnn.data.base import Rows
from bqnn.data.images import ImageData


class DigitsData(ImageData):
    """The digits of scikit-learn: images [1, 8, 8] with 17 gray levels, no download.

    Every fifth image of each class is a test image.

    Args:
        data_dir: Unused, common to all data sets.
        seed: Seed of the validation split and of the order of training batches.
        batch_size: The number of rows in a training batch.
        validation_share: The share of training rows for validation.

    Examples:
        >>> data = DigitsData()
        >>> data.setup()
        >>> data.train.inputs.shape, data.test.inputs.shape
        (torch.Size([1290, 1, 8, 8]), torch.Size([364, 1, 8, 8]))
    """

    white = 16

    def __init__(
        self,
        *,
        data_dir: str = "data",
        seed: int = 0,
        batch_size: int = 64,
        validation_share: float = 0.1,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            seed=seed,
            batch_size=batch_size,
            validation_share=validation_share,
        )
        self.class_names = [str(digit) for digit in range(10)]

    def _read(self) -> tuple[Rows, Rows]:
        pixels, targets = read_digits()
        rows = Rows(pixels.reshape(-1, 1, 8, 8).to(torch.uint8), targets.long())
        is_test = torch.zeros(len(rows), dtype=torch.bool)
        for digit in range(10):
            is_test[(rows.targets == digit).nonzero()[::5]] = True
        return rows.take(~is_test), rows.take(is_test)


def read_digits() -> tuple[Tensor, Tensor]:
    """Read pixels [1797, 64] and classes [1797] from the file that is a part of scikit-learn.

    Importing the package to read it would take half a second.
    """
    found = find_spec("sklearn")
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.exists():
            table = torch.from_numpy(np.loadtxt(path, delimiter=","))
            return table[:, :-1], table[:, -1]
    from sklearn.datasets import load_digits

    return tuple(map(torch.from_numpy, load_digits(return_X_y=True)))  # type: ignore[return-value]
