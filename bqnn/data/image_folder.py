"""ImageFolderData: image files in one folder per class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from bqnn.arguments import ArgumentError
from bqnn.data.base import Rows
from bqnn.data.decoding import ImageFormat, decoded
from bqnn.data.images import ImageData
from bqnn.data.split import draw_test_rows
from bqnn.text import printable, short

ImageFile = tuple[Path, int]  # and its class index

_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class ImageFolderData(ImageData):
    """Images in `<root>/train/<class>/*` and `<root>/test/<class>/*`, or in `<root>/<class>/*`.

    Images of different sizes are cropped to their central square and resized if `size` is given.
    Classes are the sorted folder names. Files other than BMP, JPEG, PNG and WebP are ignored.
    Images are rotated as their EXIF data say, so that pixels are those that a screen shows.

    Args:
        root: The folder; the default is `<data_dir>/images`.
        size: The side of the square images, in pixels; None if all files have one size.
        channels: 1 converts to gray, 3 to RGB; None if all files have the same channels.
        test_share: The share of the images of each class that the seed draws for the test from
            `<root>/<class>/*`; None if there are folders train and test.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel.
        crop_padding: Black pixels added on each side before a random crop.
        flip: Whether to mirror half of the training images.
        data_dir: The folder of data files.
        seed: Seed of the validation split and of the order of training batches.
        batch_size: The number of rows in a training batch.
        validation_share: The share of training rows for validation.

    Raises:
        FileNotFoundError: `setup` finds no folder.
        ValueError: `setup` finds an image that cannot be read, has another size or number of
            channels, or whose pixels are not sRGB. The message names the first such file.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> folder = TemporaryDirectory()
        >>> root = Path(folder.name)
        >>> for part in ("train", "test"):
        ...     for name in ("cat", "dog"):
        ...         (root / part / name).mkdir(parents=True)
        ...         Image.new("RGB", (4, 4)).save(root / part / name / "0.png")
        >>> data = ImageFolderData(str(root), validation_share=0)
        >>> data.setup()
        >>> data.train.inputs.shape, data.class_names
        (torch.Size([2, 3, 4, 4]), ['cat', 'dog'])
        >>> folder.cleanup()
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        size: int | None = None,
        channels: int | None = None,
        test_share: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop_padding: int = 0,
        flip: bool = False,
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
            mean=mean,
            std=std,
            crop_padding=crop_padding,
            flip=flip,
        )
        if size is not None and size < 1:
            raise ArgumentError(f"size={size}: a number of pixels; choose 1 or more", "size")
        if channels not in (None, 1, 3):
            raise ArgumentError(f"channels={channels}: choose 1 (gray) or 3 (RGB)", "channels")
        self.root = self.data_dir / "images" if root is None else Path(root).expanduser()
        self.size = size
        self.channels = channels
        self.test_share = test_share
        self.sha256: str | None = None  # of the files from which test rows are drawn

    def check_source(self) -> None:
        parts = ("train", "test") if self.test_share is None else ("",)
        for part in parts:
            _class_names(self.root / part)

    def facts(self) -> dict[str, object]:
        facts = super().facts()
        return facts if self.sha256 is None else {**facts, "source_sha256": self.sha256}

    def _read(self) -> tuple[Rows, Rows]:
        if self.test_share is None:
            train, test, self.class_names = read_image_folder(self.root, self.size, self.channels)
            return train, test
        self.class_names = _class_names(self.root)
        if {"train", "test"} <= set(self.class_names):
            raise ArgumentError(
                f"test_share={self.test_share}: {_shown(self.root)} has folders train and test, so "
                "no test images are drawn; set test_share=null, or move the folders",
                "test_share",
            )
        files = _image_files(self.root, self.class_names)
        names = "\n".join(str(path.relative_to(self.root)) for path, _ in files)
        self.sha256 = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
        labels = torch.tensor([label for _, label in files])
        is_test = draw_test_rows(labels, self.test_share, self.seed).tolist()
        train_files = [file for file, drawn in zip(files, is_test, strict=True) if not drawn]
        test_files = [file for file, drawn in zip(files, is_test, strict=True) if drawn]
        form = ImageFormat(self.size, self.channels)
        return _read_parts(train_files, test_files, form, self.root)


def read_image_folder(
    root: Path, size: int | None = None, channels: int | None = None
) -> tuple[Rows, Rows, list[str]]:
    """Read the training rows, the test rows and the class names of a folder of images.

    Args:
        root: The folder with `train/<class>/*` and `test/<class>/*`.
        size: The side of the square images, or None if all have one size.
        channels: 1 or 3, or None if all have the same channels.

    Returns:
        Rows with images [N, C, H, W] in uint8 and class indices [N], and the names of the classes.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: An image is not supported.
    """
    class_names = _class_names(root / "train")
    if _class_names(root / "test") != class_names:
        differ = sorted(set(class_names) ^ set(_class_names(root / "test")))
        raise ValueError(
            f"{_shown(root)}: class {short(differ[0])} is in only one of train and test; add its "
            "folder to the other one"
        )
    train, test = (_image_files(root / part, class_names) for part in ("train", "test"))
    return *_read_parts(train, test, ImageFormat(size, channels), root), class_names


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {_shown(folder)}: images must be in <root>/train/<class>/ and "
            "<root>/test/<class>/; copy them there, or set root (with the option test_share "
            "of task=images, test images are drawn from <root>/<class>/)"
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_visible(path))
    if not names:
        place = _shown(folder)
        raise ValueError(f"{place} has no class folders; put images in {place}/<class>")
    return names


def _image_files(folder: Path, class_names: list[str]) -> list[ImageFile]:
    files = []
    for label, name in enumerate(class_names):
        images = sorted(
            path
            for path in (folder / name).iterdir()
            if path.suffix.lower() in _EXTENSIONS and _is_visible(path)
        )
        if not images:
            raise ValueError(
                f"{_shown(folder / name)} has no images ({', '.join(_EXTENSIONS)}); add some, or "
                "remove the class from train and test"
            )
        files += [(path, label) for path in images]
    return files


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _read_parts(
    train: Sequence[ImageFile], test: Sequence[ImageFile], form: ImageFormat, root: Path
) -> tuple[Rows, Rows]:
    """Read the training rows and the test rows from their files."""
    files = [*train, *test]
    images = decoded([os.fspath(path) for path, _ in files], form, root)
    labels = torch.tensor([label for _, label in files])
    first, rest = slice(len(train)), slice(len(train), None)
    return Rows(images[first], labels[first]), Rows(images[rest], labels[rest])


def _shown(path: Path) -> str:
    return printable(str(path))
