"""MNISTData: 70,000 handwritten digits of 28x28 pixels, through torchvision."""

from __future__ import annotations

import gzip
from pathlib import Path
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

        fetch_missing(MNIST, self.folder, MNIST.mirrors[0])

    def _read(self) -> tuple[Rows, Rows]:
        from torchvision.datasets import MNIST

        if missing := _missing(self.folder):
            raise FileNotFoundError(
                f"{self.folder} has no {', '.join(missing)}; call prepare_data to "
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


def fetch_missing(kind: type[MNIST], folder: Path, address: str) -> None:
    """Download what is missing of a data set of torchvision's that has the files of MNIST.

    Each is checked by the hash that torchvision knows. FileNotFoundError: it cannot be had.
    """
    hashes = dict(kind.resources)
    for name in _missing(folder):
        remedy = (
            f"{folder} has no {name}: put it there, or set data_dir to the folder that has "
            f"{kind.__name__}/raw"
        )
        packed = fetch(f"{address}{name}.gz", hashes[f"{name}.gz"], remedy, kind="md5")
        folder.mkdir(parents=True, exist_ok=True)
        with written_beside(folder / name) as beside:
            beside.write_bytes(gzip.decompress(packed))


def _missing(folder: Path) -> list[str]:
    return [name for name in _FILES if not (folder / name).is_file()]


def _rows(part: MNIST) -> Rows:
    return Rows(part.data.unsqueeze(1), part.targets.long())
