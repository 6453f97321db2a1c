"""CIFAR10Data: 60,000 color images of 32x32 pixels in ten classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bqnn.arguments import ArgumentError
from bqnn.data.base import Rows
from bqnn.data.download import fetch, unpack
from bqnn.data.image_folder import read_image_folder
from bqnn.data.images import ImageData
from bqnn.text import short

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10


class CIFAR10Data(ImageData):
    """CIFAR-10 (Krizhevsky 2009): images [3, 32, 32], normalized per channel.

    Training images are cropped and mirrored at random.

    Args:
        source: `torchvision` reads the original files in `<data_dir>/cifar-10-batches-py`, and
            downloads them if they are missing. `folder` reads image files
            `<root>/train/<class>/*` and `<root>/test/<class>/*`.
        root: The folder of image files; the default is `<data_dir>/cifar10`.
        crop_padding: Black pixels added on each side before a random crop.
        flip: Whether to mirror half of the training images.
        data_dir: The folder of data files.
        seed: Seed of the validation split and of the order of training batches.
        batch_size: The number of rows in a training batch.
        validation_share: The share of training rows for validation.

    Raises:
        FileNotFoundError: Files are missing and cannot be downloaded.

    Examples:
        >>> data = CIFAR10Data(source="folder", root="images/cifar10")
        >>> data.batch_size, data.flip
        (256, True)
    """

    def __init__(
        self,
        source: str = "torchvision",
        root: str | None = None,
        *,
        crop_padding: int = 4,
        flip: bool = True,
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
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),
            crop_padding=crop_padding,
            flip=flip,
        )
        if source not in ("torchvision", "folder"):
            raise ArgumentError(
                f"source={short(source)}: unknown; choose torchvision (the original files) or "
                "folder (a folder of images)",
                "source",
            )
        self.source = source
        self.root = self.data_dir / "cifar10" if root is None else Path(root).expanduser()

    def prepare_data(self) -> None:
        """Download missing files, unless `source` is `folder`."""
        if self.is_set_up or self.source == "folder":
            return
        from torchvision.datasets import CIFAR10

        folder = self.data_dir / CIFAR10.base_folder
        if not folder.is_dir():  # torchvision verifies the files when it reads them
            remedy = self._remedy(folder)
            archive = fetch(CIFAR10.url, CIFAR10.tgz_md5, remedy, kind="md5", largest=2**28)
            unpack(archive, folder)

    def _read(self) -> tuple[Rows, Rows]:
        if self.source == "folder":
            train, test, self.class_names = read_image_folder(self.root)
            return train, test
        part = self._part(train=True)
        self.class_names = list(part.classes)
        return _rows(part), _rows(self._part(train=False))

    def _part(self, *, train: bool) -> CIFAR10:
        from torchvision.datasets import CIFAR10

        try:
            return CIFAR10(str(self.data_dir), train=train)
        except (RuntimeError, OSError) as error:  # RuntimeError: missing or altered files
            folder = self.data_dir / CIFAR10.base_folder
            raise FileNotFoundError(f"{error}; {self._remedy(folder)}") from error

    def _remedy(self, folder: Path) -> str:
        return (
            f"CIFAR-10 is incomplete in {folder}: delete this folder to download it again, unpack "
            "the archive there, set data_dir to the folder that contains it, or read image files "
            "with source=folder"
        )


def _rows(part: CIFAR10) -> Rows:
    images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    return Rows(images, torch.tensor(part.targets))
