"""MNISTData and FashionMNISTData: 70,000 images of 28x28 pixels, of digits or of clothes."""

from __future__ import annotations

import gzip
import os
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bqnn.data.base import Rows
from bqnn.data.download import fetch
from bqnn.data.images import ImageData
from bqnn.files import open_regular, written_beside
from bqnn.text import one_line, printable

if TYPE_CHECKING:
    from torchvision.datasets import MNIST

# The authors' repository, because torchvision's mirror does not support https.
FASHION_MNIST = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
)
_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


_LARGEST = 2**30  # bytes; MNIST's largest file has 47 million


class IDXImageData(ImageData):
    """Base class of data sets in MNIST's format: images [1, 28, 28], scaled to [0, 1].

    Args:
        data_dir: The folder of data files.
        seed: Seed of the validation split and of the order of training batches.
        batch_size: The number of rows in a training batch.
        validation_share: The share of training rows for validation.
        crop_padding: Black pixels added on each side before a random crop.
        flip: Whether to mirror half of the training images.

    Attributes:
        folder: The folder of the four files, `<data_dir>/<kind>/raw`.

    Raises:
        FileNotFoundError: Files are missing and cannot be downloaded.
        ValueError: A file is damaged.
    """

    kind: ClassVar[str]  # the name of the class in torchvision
    classes: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        *,
        data_dir: str = "data",
        seed: int = 0,
        batch_size: int = 256,
        validation_share: float = 0.1,
        crop_padding: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            seed=seed,
            batch_size=batch_size,
            validation_share=validation_share,
            crop_padding=crop_padding,
            flip=flip,
        )
        self.class_names = list(self.classes)
        self.folder = self.data_dir / self.kind / "raw"

    def prepare_data(self) -> None:
        """Download missing files."""
        fetch_missing(self.kind, self.data_dir)

    def _read(self) -> tuple[Rows, Rows]:
        if missing := _missing(self.folder):
            raise FileNotFoundError(
                f"{self.folder} has no {', '.join(missing)}; call prepare_data to "
                f"download, or set data_dir to the folder that contains {self.kind}/raw"
            )
        return read_part(self.folder, "train"), read_part(self.folder, "t10k")


class MNISTData(IDXImageData):
    """MNIST (LeCun et al. 1998): images of handwritten digits [1, 28, 28], scaled to [0, 1].

    The files are read from `<data_dir>/MNIST/raw`, and downloaded if they are missing.

    Examples:
        >>> MNISTData(data_dir="data").folder.as_posix()
        'data/MNIST/raw'
    """

    kind = "MNIST"
    classes = tuple("0123456789")


class FashionMNISTData(IDXImageData):
    """FashionMNIST (Xiao et al. 2017): images of clothes [1, 28, 28], scaled to [0, 1].

    The files are read from `<data_dir>/FashionMNIST/raw`, and downloaded if they are missing.

    Examples:
        >>> FashionMNISTData(data_dir="data").folder.as_posix()
        'data/FashionMNIST/raw'
    """

    kind = "FashionMNIST"
    classes = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )


def read_part(folder: Path, part: str) -> Rows:
    """Read a part of a data set in MNIST's format.

    Args:
        folder: The folder of the files.
        part: `train` or `t10k`.

    Returns:
        Rows with images [N, 1, 28, 28] in uint8 and class indices [N].

    Raises:
        ValueError: A file is damaged, or belongs to another data set.
    """
    images_path = folder / f"{part}-images-idx3-ubyte"
    labels_path = folder / f"{part}-labels-idx1-ubyte"
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1).long()
    if images.shape[1:] != (28, 28):
        height, width = images.shape[1:]
        raise _damaged(images_path, f"its images have {width}x{height} pixels, not 28x28")
    if len(labels) != len(images):
        raise _damaged(labels_path, f"{len(labels)} labels for {len(images)} images")
    if (labels > 9).any():
        row = int((labels > 9).nonzero()[0])
        raise _damaged(labels_path, f"label {row} (from 0) is {labels[row]}, not 0 to 9")
    return Rows(images.unsqueeze(1), labels)


def _read_idx(path: Path, num_dims: int) -> Tensor:
    """Read an IDX file as a uint8 tensor with the shape in its header."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(4 + 4 * num_dims)
            shape = [int.from_bytes(start[i : i + 4], "big") for i in range(4, len(start), 4)]
            if start[:4] != bytes([0, 0, 8, num_dims]) or len(shape) < num_dims:
                raise ValueError(f"its header is not that of bytes in {num_dims} dimensions")
            if prod(shape) != size - len(start) or 0 in shape or size > _LARGEST:
                raise ValueError(f"it has {size} bytes, which do not fit the shape {shape}")
            return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).reshape(shape)
    except (OSError, ValueError) as error:
        raise _damaged(path, one_line(str(error))) from error


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{printable(str(path))} is damaged ({reason}), so {printable(path.parent.parent.name)} "
        "cannot be read; delete the file to download it again"
    )


def fetch_missing(kind: str, data_dir: Path) -> Path:
    """Download the missing files of a data set in MNIST's format.

    torchvision lists the hash of each file, which is verified.

    Args:
        kind: The name of its class in torchvision, `MNIST` or `FashionMNIST`.
        data_dir: The folder of data files.

    Returns:
        The folder of the files.

    Raises:
        FileNotFoundError: A file cannot be downloaded.
        ValueError: The hash of a file differs.
    """
    folder = data_dir / kind / "raw"
    if not (missing := _missing(folder)):
        return folder
    from torchvision import datasets

    found: type[MNIST] = getattr(datasets, kind)
    address = FASHION_MNIST if kind == "FashionMNIST" else found.mirrors[0]
    hashes = dict(found.resources)
    for name in missing:
        remedy = (
            f"{folder} has no {name}: copy it there, or set data_dir to the folder that contains "
            f"{kind}/raw"
        )
        packed = fetch(f"{address}{name}.gz", hashes[f"{name}.gz"], remedy, kind="md5")
        folder.mkdir(parents=True, exist_ok=True)
        with written_beside(folder / name) as beside:
            beside.write_bytes(gzip.decompress(packed))
    return folder


def _missing(folder: Path) -> list[str]:
    return [name for name in _FILES if not (folder / name).is_file()]
