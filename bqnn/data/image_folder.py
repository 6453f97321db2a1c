"""ImageFolderData: any images sorted into one folder per class."""

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
_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}  # PIL's mode, and what it is read as
_SRGB = {
    b"gAMA": (0.45455,),
    b"cHRM": (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06),  # white, red, green, blue: x, y
}


class ImageFolderData(ImageData):
    """Images of one size from `<root>/train/<class>/*` and `<root>/test/<class>/*`.

    Classes are the sorted folder names; files other than BMP, JPEG, PNG and WebP are ignored.
    `root` is `<data_dir>/images` unless given. Pixels are those that a screen would show: an image
    is turned as its EXIF data say. Raises ValueError, with the first such file, for images that
    cannot be read, that differ in size or channels, or whose colors are not those of their pixels.
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
    """Read the training and test images below `root`, and their class names."""
    from PIL import Image

    class_names = _class_names(root / "train")
    if _class_names(root / "test") != class_names:
        differ = sorted(set(class_names) ^ set(_class_names(root / "test")))
        raise ValueError(
            f"{_shown(root)}: class {short(differ[0])} is in one of train and test only; a class "
            "needs a folder in both"
        )
    files = {part: _image_files(root / part, class_names) for part in ("train", "test")}
    first = files["train"][0][0]
    with warnings.catch_warnings():
        # PIL warns of pictures so large that they may be meant to fill the memory: refused, too.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # And of EXIF data that are damaged: they turn nothing, as in a browser.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        shape = _decode(first).shape
        train, test = (_read_part(files[part], first, shape) for part in ("train", "test"))
    return train, test, class_names


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {_shown(folder)}: images are read from <root>/train/<class>/ and "
            "<root>/test/<class>/; put them there or set root"
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_visible(path))
    if not names:
        place = _shown(folder)
        raise ValueError(f"{place} holds no class folders; put images in {place}/<class>")
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
                f"{_shown(folder / name)} holds no images ({', '.join(_EXTENSIONS)}); add some, or "
                "remove the class from train and test"
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
                f"{_shown(path)} is {_describe(image.shape)}, but {_shown(first)} is "
                f"{_describe(shape)}; all images of a data set need one size and as many channels: "
                "convert it"
            )
        pixels[row] = image
    return Rows(images, torch.tensor([label for _, label in files]))


def _decode(path: Path) -> np.ndarray:
    """Pixels [H, W, C] as they are displayed, with one channel or three."""
    from PIL import Image

    try:
        with open_regular(path) as file:
            chunks = _chunks(file)
            with Image.open(file, formats=_FORMATS) as image:
                refusal = _refusal(image, chunks)
                if refusal is None:
                    pixels = np.asarray(_upright(image).convert(_MODES[image.mode]))
                    return pixels.reshape(*pixels.shape[:2], -1)
    except Exception as error:  # whatever a damaged file leads PIL to
        raise ValueError(
            f"{_shown(path)} cannot be read as an image ({_reason(error)}); replace or remove it"
        ) from error
    raise ValueError(f"{_shown(path)} {refusal}: convert it")


def _refusal(image: Image.Image, chunks: dict[bytes, bytes]) -> str | None:
    """What displays a picture in other colors than its pixels have, if anything does."""
    if image.mode not in _MODES:
        return f"has pixels of mode {image.mode}; only 8-bit grey and RGB images are read"
    if chunks.get(b"IHDR", bytes(9))[8] > 8:
        return "has 16 bits per channel; only 8-bit grey and RGB images are read"
    if "transparency" in image.info or (image.palette and "A" in image.palette.mode):
        return "has transparent pixels, whose color depends on what is behind them"
    if getattr(image, "n_frames", 1) > 1:
        return f"holds {getattr(image, 'n_frames', 1)} pictures, and one is read from a file"
    if b"BMP profile" in chunks:
        return "has a color profile"
    if b"cICP" in chunks:
        return "has a color space of its own (cICP)"
    if profile := image.info.get("icc_profile"):
        return None if _is_srgb(profile) else "has a color profile that is not sRGB"
    if b"sRGB" not in chunks and not _is_usual(chunks):
        return "has a gamma or primary colors that are not those of sRGB"
    return None


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned and mirrored as its EXIF data say."""
    from PIL import ImageOps

    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # what cannot be read turns nothing, as in a browser
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _chunks(file: BinaryIO) -> dict[bytes, bytes]:
    """The first bytes of each chunk of a PNG file before its pixels, and a BMP file's profile.

    PIL cuts 16 bits to 8, leaves the gamma to the caller, and says nothing of the others.
    """
    chunks = {}
    start = file.read(74)
    if start[:2] == b"BM" and start[14:15] == b"\x7c" and start[70:] in (b"DEBM", b"KNIL"):
        chunks[b"BMP profile"] = start[70:]  # in the file, or linked to
    file.seek(0)
    if file.read(8) == b"\x89PNG\r\n\x1a\n":
        while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
            length = int.from_bytes(head[:4], "big")
            chunks[head[4:]] = file.read(min(length, 32))
            file.seek(max(length - 32, 0) + 4, SEEK_CUR)  # and the checksum
    file.seek(0)
    return chunks


def _is_usual(chunks: dict[bytes, bytes]) -> bool:
    """Whether gAMA and cHRM, where they are, say what sRGB has, to a hundredth."""
    for name, usual in _SRGB.items():
        data = chunks.get(name, b"")
        values = [int.from_bytes(data[i : i + 4], "big") / 1e5 for i in range(0, len(data), 4)]
        if any(abs(value - known) > 0.01 for value, known in zip(values, usual, strict=False)):
            return False
    return True


@lru_cache(maxsize=16)
def _is_srgb(profile: bytes) -> bool:
    """Whether a color profile changes no color by more than two of 255 levels on an sRGB screen."""
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
    except (OSError, ValueError, ImageCms.PyCMSError):  # nobody can tell how it would look
        return False
    difference = np.asarray(shown).astype(int) - np.asarray(probe.convert("RGB"))
    return bool(abs(difference).max() <= 2)


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # its text is the path, or the file's repr
        return f"it is no {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file, or is damaged"
    return one_line(str(error))[:300]


def _shown(path: Path) -> str:
    return printable(str(path))


def _describe(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"
