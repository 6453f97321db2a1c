"""ImageFolderData: image files in one folder per class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from io import SEEK_CUR, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from bqnn.data.base import Rows
from bqnn.data.images import ImageData
from bqnn.files import open_regular
from bqnn.text import one_line, printable, short

if TYPE_CHECKING:
    from PIL import Image

_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}  # PIL's mode, and the converted mode
_SRGB = {
    b"gAMA": (0.45455,),
    b"cHRM": (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06),  # white, red, green, blue: x, y
}


class ImageFolderData(ImageData):
    """Images of one size in `<root>/train/<class>/*` and `<root>/test/<class>/*`.

    Classes are the sorted folder names. Files other than BMP, JPEG, PNG and WebP are ignored.
    Images are rotated as their EXIF data say, so that pixels are those that a screen shows.

    Args:
        root: The folder; the default is `<data_dir>/images`.
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

    Example:
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
    """Read the training rows, the test rows and the class names of a folder of images.

    Args:
        root: The folder with `train/<class>/*` and `test/<class>/*`.

    Returns:
        Rows with images [N, C, H, W] in uint8 and class indices [N], and the names of the classes.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: An image is not supported.
    """
    from PIL import Image

    class_names = _class_names(root / "train")
    if _class_names(root / "test") != class_names:
        differ = sorted(set(class_names) ^ set(_class_names(root / "test")))
        raise ValueError(
            f"{_shown(root)}: class {short(differ[0])} is in only one of train and test; add its "
            "folder to the other one"
        )
    files = {part: _image_files(root / part, class_names) for part in ("train", "test")}
    first = files["train"][0][0]
    with warnings.catch_warnings():
        # Images so large that they may be a decompression bomb are an error.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # Damaged EXIF data are ignored, as in a browser.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        shape = _decode(first).shape
        train, test = (_read_part(files[part], first, shape) for part in ("train", "test"))
    return train, test, class_names


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {_shown(folder)}: images must be in <root>/train/<class>/ and "
            "<root>/test/<class>/; copy them there, or set root"
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_visible(path))
    if not names:
        place = _shown(folder)
        raise ValueError(f"{place} has no class folders; put images in {place}/<class>")
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
                f"{_shown(folder / name)} has no images ({', '.join(_EXTENSIONS)}); add some, or "
                "remove the class from train and test"
            )
        files += [(path, label) for path in images]
    return files


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _read_part(files: list[tuple[Path, int]], first: Path, shape: tuple[int, ...]) -> Rows:
    height, width, channels = shape
    images = torch.empty(len(files), channels, height, width, dtype=torch.uint8)
    pixels = images.permute(0, 2, 3, 1).numpy()  # a view [N, H, W, C], the order of files
    # Two threads were slower for small images: they wait for the interpreter's lock.
    for row, (path, _) in enumerate(files):
        image = _decode(path)
        if image.shape != shape:
            raise ValueError(
                f"{_shown(path)} is {_describe(image.shape)}, but {_shown(first)} is "
                f"{_describe(shape)}; all images of a data set need the same size and channels: "
                "convert it"
            )
        pixels[row] = image
    return Rows(images, torch.tensor([label for _, label in files]))


def _decode(path: Path) -> np.ndarray:
    """Read the pixels [H, W, C] of an image as displayed, with one or three channels."""
    from PIL import Image

    try:
        with open_regular(path) as file:
            chunks = _chunks(file)
            with Image.open(file, formats=_FORMATS) as image:
                refusal = _refusal(image, chunks)
                if refusal is None:
                    pixels = np.asarray(_upright(image).convert(_MODES[image.mode]))
                    return pixels.reshape(*pixels.shape[:2], -1)
    except Exception as error:  # PIL can raise anything for a damaged file
        raise ValueError(
            f"{_shown(path)} cannot be read as an image ({_reason(error)}); replace or remove it"
        ) from error
    raise ValueError(f"{_shown(path)} {refusal}: convert it")


def _refusal(image: Image.Image, chunks: dict[bytes, bytes]) -> str | None:
    """Return why an image is displayed with other colors than its pixels have, or None."""
    if image.mode not in _MODES:
        return f"has pixels of mode {image.mode}; only 8-bit gray and RGB images are supported"
    if chunks.get(b"IHDR", bytes(9))[8] > 8:
        return "has 16 bits per channel; only 8-bit gray and RGB images are supported"
    if "transparency" in image.info or (image.palette and "A" in image.palette.mode):
        return "has transparent pixels, whose color depends on the background"
    if getattr(image, "n_frames", 1) > 1:
        return f"has {getattr(image, 'n_frames', 1)} frames; only single images are supported"
    if b"BMP profile" in chunks:
        return "has a color profile"
    if b"cICP" in chunks:
        return "has a custom color space (cICP)"
    if profile := image.info.get("icc_profile"):
        return None if _is_srgb(profile) else "has a color profile that is not sRGB"
    if b"sRGB" not in chunks and not _is_usual(chunks):
        return "has a gamma or primary colors other than sRGB"
    return None


def _upright(image: Image.Image) -> Image.Image:
    """Rotate and mirror an image as its EXIF data say."""
    from PIL import ImageOps

    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # unreadable EXIF data are ignored, as in a browser
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _chunks(file: BinaryIO) -> dict[bytes, bytes]:
    """Read the first bytes of each PNG chunk before the pixels, or the color profile of a BMP.

    PIL truncates 16 bits to 8, ignores the gamma, and does not expose the other chunks.
    """
    chunks = {}
    start = file.read(74)
    if start[:2] == b"BM" and start[14:15] == b"\x7c" and start[70:] in (b"DEBM", b"KNIL"):
        chunks[b"BMP profile"] = start[70:]  # embedded or linked
    file.seek(0)
    if file.read(8) == b"\x89PNG\r\n\x1a\n":
        while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
            length = int.from_bytes(head[:4], "big")
            chunks[head[4:]] = file.read(min(length, 32))
            file.seek(max(length - 32, 0) + 4, SEEK_CUR)  # skip the rest and the checksum
    file.seek(0)
    return chunks


def _is_usual(chunks: dict[bytes, bytes]) -> bool:
    """Return whether gAMA and cHRM are missing or equal to those of sRGB within 0.01."""
    for name, usual in _SRGB.items():
        data = chunks.get(name, b"")
        values = [int.from_bytes(data[i : i + 4], "big") / 1e5 for i in range(0, len(data), 4)]
        if any(abs(value - known) > 0.01 for value, known in zip(values, usual, strict=False)):
            return False
    return True


@lru_cache(maxsize=16)
def _is_srgb(profile: bytes) -> bool:
    """Return whether a color profile changes every color by at most 2 of 255 levels in sRGB."""
    from PIL import Image, ImageCms

    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        is_grey = source.profile.xcolor_space.strip() == "GRAY"
        levels = np.linspace(0, 255, 18).astype(np.uint8)
        colors = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(18, -1, 3)
        probe = Image.fromarray(colors).convert("L" if is_grey else "RGB")
        screen = ImageCms.createProfile("sRGB")
        shown = ImageCms.profileToProfile(probe, source, screen, outputMode="RGB")
        assert shown is not None
    except (OSError, ValueError, ImageCms.PyCMSError):  # the profile cannot be applied
        return False
    difference = np.asarray(shown).astype(int) - np.asarray(probe.convert("RGB"))
    return bool(abs(difference).max() <= 2)


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # its text contains only the path
        return f"it is not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file, or is damaged"
    return one_line(str(error))[:300]


def _shown(path: Path) -> str:
    return printable(str(path))


def _describe(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"
