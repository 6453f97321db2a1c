"""DigitsData: the 1,797 handwritten digits of 8x8 pixels that scikit-learn ships."""

from __future__ import annotations

import torch

from bqnn.data.base import Rows
from bqnn.data.images import ImageData


class DigitsData(ImageData):
    """Images [1, 8, 8] of 17 grey levels; every fifth image of each class is a test image."""

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
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
        rows = Rows(images, torch.from_numpy(digits.target).long())
        is_test = torch.zeros(len(rows), dtype=torch.bool)
        for digit in range(10):
            is_test[(rows.targets == digit).nonzero()[::5]] = True
        return rows.take(~is_test), rows.take(is_test)
