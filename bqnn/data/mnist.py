"""MNISTData: 70,000 handwritten digits of 28x28 pixels."""

from __future__ import annotations

import gzip
import os
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bqnn.data.base import Rows
from bqnn.data.download import fetch
from bqnn.data.images import ImageData
from bqnn.files import open_regular, written_beside
from bqnn.text import one_line, printable

if TYPE_CHECKING:
    from torchvision.datasets import MNIST

_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


_LARGEST = 2**30  # bytes; MNIST's largest file has 47 million


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
        if missing := _missing(self.folder):
            raise FileNotFoundError(
                f"{self.folder} has no {', '.join(missing)}; call prepare_data to "
                "download, or set data_dir to the folder that has MNIST/raw"
            )
        return read_part(self.folder, "train"), read_part(self.folder, "t10k")


def read_part(folder: Path, part: str) -> Rows:
    """Read the images [N, 1, 28, 28] and classes [N] of `train` or `t10k` in MNIST's format.

    ValueError, with the file: it is damaged, or of another data set.
    """
    images_path = folder / f"{part}-images-idx3-ubyte"
    labels_path = folder / f"{part}-labels-idx1-ubyte"
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1).long()
    if images.shape[1:] != (28, 28):
        height, width = images.shape[1:]
        raise _damaged(images_path, f"its images are {width}x{height} pixels, and not 28x28")
    if len(labels) != len(images):
        raise _damaged(labels_path, f"{len(labels)} labels for {len(images)} images")
    if (labels > 9).any():
        row = int((labels > 9).nonzero()[0])
        raise _damaged(labels_path, f"label {row} (from 0) is {labels[row]}, and not 0 to 9")
    return Rows(images.unsqueeze(1), labels)


def _read_idx(path: Path, num_dims: int) -> Tensor:
    """The bytes of an IDX file as a tensor with the shape that its header says: uint8."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(4 + 4 * num_dims)
            shape = [int.from_bytes(start[i : i + 4], "big") for i in range(4, len(start), 4)]
            if start[:4] != bytes([0, 0, 8, num_dims]) or len(shape) < num_dims:
                raise ValueError(f"it does not begin as one of {num_dims} dimensions of bytes")
            if prod(shape) != size - len(start) or 0 in shape or size > _LARGEST:
                raise ValueError(f"it has {size} bytes, which do not hold {shape} values")
            return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).reshape(shape)
    except (OSError, ValueError) as error:
        raise _damaged(path, one_line(str(error))) from error


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{printable(str(path))} is damaged ({reason}); MNIST cannot be read: delete the "
        "file and it is downloaded again"
    )


def fetch_missing(kind: type[MNIST], folder: Path, address: str) -> None:
    """Download the missing files of a torchvision data set in MNIST's format.

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
