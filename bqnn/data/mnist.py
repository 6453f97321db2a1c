"""MNISTData: 70,000 handwritten digits of 28x28 pixels, through torchvision."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

from bqnn.data.base import Rows
from bqnn.data.download import fetch
from bqnn.data.images import ImageData
from bqnn.files import written_beside

if TYPE_CHECKING:
    from torchvision.datasets import MNIST

_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class MNISTData(ImageData):
    """Images [1, 28, 28] scaled to [0, 1], from `<data_dir>/MNIST/raw`.

    Downloaded where they are missing. Raises FileNotFoundError, with the folder, where that
    fails, and ValueError for damaged files.
    """

    def __init__(
        self,
        *,
        data_dir: str = "data",
        seed: int = 0,
        batch_size: int = 256,
        validation_share: float = 0.1,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            seed=seed,
            batch_size=batch_size,
            validation_share=validation_share,
        )
        self.class_names = [str(digit) for digit in range(10)]
        self.folder = self.data_dir / "MNIST" / "raw"

    def prepare_data(self) -> None:
        """Download the files that are missing."""
        from torchvision.datasets import MNIST

        hashes = dict(MNIST.resources)
        for name in self._missing():
            remedy = (
                f"{self.folder} has no {name}: put it there, or set data_dir to the folder that "
                "has MNIST/raw"
            )
            url = f"{MNIST.mirrors[0]}{name}.gz"
            content = gzip.decompress(fetch(url, hashes[f"{name}.gz"], remedy, kind="md5"))
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_beside(self.folder / name) as beside:
                beside.write_bytes(content)

    def _read(self) -> tuple[Rows, Rows]:
        from torchvision.datasets import MNIST

        if self._missing():
            raise FileNotFoundError(
                f"{self.folder} has no {', '.join(self._missing())}; call prepare_data to "
                "download, or set data_dir to the folder that has MNIST/raw"
            )
        try:
            train, test = (MNIST(str(self.data_dir), train=train) for train in (True, False))
            return _rows(train), _rows(test)
        except (RuntimeError, ValueError, AssertionError, KeyError) as error:
            raise ValueError(
                f"MNIST in {self.folder} is damaged ({error}); delete the folder and it is "
                "downloaded again"
            ) from error

    def _missing(self) -> list[str]:
        return [name for name in _FILES if not (self.folder / name).is_file()]


def _rows(part: MNIST) -> Rows:
    return Rows(part.data.unsqueeze(1), part.targets.long())
