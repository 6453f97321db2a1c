"""Decode image files as a viewer shows them.

The module stands outside of the rooms that need torch, so that processes which only decode images
start fast.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from io import SEEK_CUR, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from bqnn.files import open_regular
from bqnn.text import one_line, printable

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}  # PIL's mode, and the converted mode
_CHANNELS = {1: "L", 3: "RGB"}
_SRGB = {
    b"gAMA": (0.45455,),
    b"cHRM": (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06),  # white, red, green, blue: x, y
}


def decode(path: Path, size: int | None = None, channels: int | None = None) -> np.ndarray:
    """Read the pixels of an image as displayed.

    Args:
        path: A BMP, JPEG, PNG or WebP file.
        size: The side of the square to which the image is cropped, about its center, and then
            resized (bilinear, with antialiasing); None keeps the size.
        channels: 1 for gray (the luma of ITU-R 601) or 3 for RGB; None keeps the channels.

    Returns:
        Pixels in uint8 [H, W, C].

    Raises:
        ValueError: The file cannot be read, or has pixels that are not shown as they are. The
            message has the path.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "cat.png")
        ...     Image.new("RGB", (30, 20)).save(path)
        ...     decode(path).shape, decode(path, size=8, channels=1).shape
        ((20, 30, 3), (8, 8, 1))
    """
    from PIL import Image, ImageOps

    where = printable(str(path))
    try:
        with open_regular(path) as file:
            chunks = _chunks(file)
            with Image.open(file, formats=_FORMATS) as image:
                refusal = _refusal(image, chunks)
                if refusal is None:
                    shown = _upright(image).convert(_MODES[image.mode])
                    if channels is not None:
                        shown = shown.convert(_CHANNELS[channels])
                    if size is not None:
                        # It crops first, so that a very long image takes no more memory.
                        shown = ImageOps.fit(shown, (size, size), Image.Resampling.BILINEAR)
                    pixels = np.asarray(shown)
                    return pixels.reshape(*pixels.shape[:2], -1)
    except Exception as error:  # PIL can raise anything for a damaged file
        raise ValueError(
            f"{where} cannot be read as an image ({_reason(error)}); replace or remove it"
        ) from error
    raise ValueError(f"{where} {refusal}: convert it")


def decode_many(
    paths: Sequence[str], size: int | None = None, channels: int | None = None
) -> tuple[list[np.ndarray], ValueError | None]:
    """Decode images up to the first that cannot be read.

    Args:
        paths: Paths of image files.
        size: See `decode`.
        channels: See `decode`.

    Returns:
        The pixels of each image, and the error of the first one that cannot be read.
    """
    from PIL import Image

    images: list[np.ndarray] = []
    with warnings.catch_warnings():
        # Images so large that they may be a decompression bomb are an error.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # Damaged EXIF data are ignored, as in a browser.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        for path in paths:
            try:
                images.append(decode(Path(path), size, channels))
            except ValueError as error:
                return images, error
    return images, None


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
