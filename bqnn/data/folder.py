"""ImageFolderData: any images sorted into one folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bqnn.data.base import Rows
from bqnn.data.images import ImageData

_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}  # PIL's mode, and what it is read as


class ImageFolderData(ImageData):
    """Images of one size from `<root>/train/<class>/*` and `<root>/test/<class>/*`.

    Classes are the sorted folder names; files other than BMP, JPEG, PNG and WebP are ignored.
    `root` is `<data_dir>/images` unless given. Raises ValueError, with the first such file, for
    images that cannot be read or differ in size or channels.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
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
        self.root = self.data_dir / "images" if root is None else Path(root).expanduser()

    def _read(self) -> tuple[Rows, Rows]:
        train, test, self.class_names = read_image_folder(self.root)
        return train, test


def read_image_folder(root: Path) -> tuple[Rows, Rows, list[str]]:
    """The train and the test images below `root`, and the names of their classes."""
    class_names = _class_names(root / "train")
    if _class_names(root / "test") != class_names:
        differ = sorted(set(class_names) ^ set(_class_names(root / "test")))
        raise ValueError(
            f"{root}: class {differ[0]!r} is in one of train and test only; a class needs a folder "
            "in both"
        )
    files = {part: _image_files(root / part, class_names) for part in ("train", "test")}
    first = files["train"][0][0]
    shape = _decode(first).shape
    train, test = (_read_part(files[part], first, shape) for part in ("train", "test"))
    return train, test, class_names


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}: images are read from <root>/train/<class>/ and "
            "<root>/test/<class>/; put them there or set root"
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_visible(path))
    if not names:
        raise ValueError(f"{folder} holds no class folders; put images in {folder / '<class>'}")
    return names


def _image_files(folder: Path, class_names: list[str]) -> list[tuple[Path, int]]:
    files = []
    for label, name in enumerate(class_names):
        images = sorted(
            path
            for path in (folder / name).iterdir()
            if path.suffix.lower() in _EXTENSIONS and _is_visible(path)
        )
        if not images:
            raise ValueError(
                f"{folder / name} holds no images ({', '.join(_EXTENSIONS)}); add some, or remove "
                "the class from train and test"
            )
        files += [(path, label) for path in images]
    return files


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _read_part(files: list[tuple[Path, int]], first: Path, shape: tuple[int, ...]) -> Rows:
    height, width, channels = shape
    images = torch.empty(len(files), channels, height, width, dtype=torch.uint8)
    pixels = images.permute(0, 2, 3, 1).numpy()  # the same memory, ordered as files are
    # One thread: for small images two measured slower, they wait for the interpreter's lock.
    for row, (path, _) in enumerate(files):
        image = _decode(path)
        if image.shape != shape:
            raise ValueError(
                f"{path} is {_describe(image.shape)}, but {first} is {_describe(shape)}; all "
                "images of a data set need one size and as many channels: convert it"
            )
        pixels[row] = image
    return Rows(images, torch.tensor([label for _, label in files]))


def _decode(path: Path) -> np.ndarray:
    """Pixels [H, W, C] with one channel or three."""
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.mode in _MODES:
                pixels = np.asarray(image.convert(_MODES[image.mode]))
                return pixels.reshape(image.height, image.width, -1)
            mode = image.mode
    except (OSError, SyntaxError, ValueError) as error:  # whatever a damaged file leads PIL to
        raise ValueError(
            f"{path} cannot be read as an image ({error}); replace or remove it"
        ) from error
    raise ValueError(
        f"{path} has pixels of mode {mode}; only 8-bit grey and RGB images are read: convert it"
    )


def _describe(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"
