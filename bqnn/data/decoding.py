"""Decode many image files: in several processes, and only once."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

from bqnn.files import written_beside
from bqnn.image_file import decode_many
from bqnn.text import printable

CHUNK = 256  # files
WORTH_PROCESSES = 4.0  # seconds of decoding that several processes share; to start them takes 1 s
WORTH_KEEPING = 1.0  # seconds of decoding, after which the pixels are kept

Chunk = tuple[list[np.ndarray], ValueError | None]


class ImageFormat(NamedTuple):
    """What images are converted to, see `bqnn.image_file.decode`."""

    size: int | None
    channels: int | None


def decoded(paths: Sequence[str], form: ImageFormat, root: Path) -> Tensor:
    """Read image files of one size.

    Where decoding takes long, several processes share it. Where it takes more than a second, the
    pixels are kept in a hidden file in `root`, or in the cache of the user if `root` cannot be
    written. The file is used as long as names, sizes and times of the image files are the same.

    Args:
        paths: Paths of image files.
        form: What they are converted to.
        root: The folder that contains the files.

    Returns:
        Images [N, C, H, W] in uint8.

    Raises:
        ValueError: An image cannot be read, or has another size or number of channels than the
            first. The message names the first such file.
    """
    names = sorted(paths)
    places = _places(root, form, _digest(names, form, root))
    order = {name: row for row, name in enumerate(names)}
    rows = torch.tensor([order[path] for path in paths])
    for place in places:
        kept = _kept(place, len(names))
        if kept is not None:
            return kept[rows]
    start = time.monotonic()
    images = _stacked(paths, form)
    if time.monotonic() - start > WORTH_KEEPING:
        _keep(places, images[rows.argsort()])
    return images


def _stacked(paths: Sequence[str], form: ImageFormat) -> Tensor:
    """Decode all files into one tensor."""
    (first,) = _raised(decode_many(paths[:1], *form))
    height, width, channels = first.shape
    images = torch.empty(len(paths), channels, height, width, dtype=torch.uint8)
    pixels = images.permute(0, 2, 3, 1).numpy()  # a view [N, H, W, C], the order of files
    row = 0
    for found, error in _chunks(paths, form):
        for image in found:
            if image.shape != first.shape:
                raise ValueError(
                    f"{printable(paths[row])} is {_describe(image.shape)}, but "
                    f"{printable(paths[0])} is {_describe(first.shape)}; all images of a data set "
                    "need the same size and channels: convert it, or set the options size and "
                    "channels of task=images"
                )
            pixels[row] = image
            row += 1
        if error is not None:
            raise error
    return images


def _chunks(paths: Sequence[str], form: ImageFormat) -> Iterator[Chunk]:
    """Decode files chunk by chunk: the first in this process, and the rest in several."""
    start, done = time.monotonic(), 0
    yield decode_many(paths[:CHUNK], *form)
    rest = [paths[first : first + CHUNK] for first in range(CHUNK, len(paths), CHUNK)]
    if (time.monotonic() - start) * len(rest) < WORTH_PROCESSES:
        yield from (decode_many(files, *form) for files in rest)
        return
    with suppress(BrokenProcessPool):  # for instance where memory is short
        for chunk in _in_processes(rest, form):
            done += 1
            yield chunk
    for files in rest[done:]:
        yield decode_many(files, *form)


def _in_processes(chunks: Sequence[Sequence[str]], form: ImageFormat) -> Iterator[Chunk]:
    """Decode chunks of files in as many processes as there are cores, in order.

    Threads would wait for the interpreter's lock: most of the time for a small image is Python.
    """
    from joblib import Parallel, cpu_count, delayed
    from joblib.externals.loky import get_reusable_executor

    num_processes = min(cpu_count(), len(chunks))
    if num_processes == 1:
        return
    work = (delayed(decode_many)(files, *form) for files in chunks)
    try:
        yield from Parallel(num_processes, return_as="generator", batch_size=1)(work)
    finally:
        get_reusable_executor().shutdown(wait=False)


def _raised(chunk: Chunk) -> list[np.ndarray]:
    images, error = chunk
    if error is not None:
        raise error
    return images


def _digest(names: Sequence[str], form: ImageFormat, root: Path) -> str:
    """Return a hash of all that the decoded pixels depend on."""
    above = os.fspath(root)
    told = hashlib.sha256(repr((1, PIL.__version__, form)).encode())
    for name in names:
        found = os.stat(name)
        told.update(os.fsencode(name.removeprefix(above)))
        told.update(f"/{found.st_size}/{found.st_mtime_ns}/".encode())
    return told.hexdigest()[:32]


def _places(root: Path, form: ImageFormat, digest: str) -> list[Path]:
    """Return the paths of the file with decoded images, the preferred one first."""
    name = f".decoded_{form.size}_{form.channels}_{digest}.npy"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    of_root = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return [root / name, Path(cache, "bqnn", of_root, name)]


def _kept(place: Path, count: int) -> Tensor | None:
    """Read decoded images, or return None if there are none or the file is damaged."""
    try:
        if not place.is_file():  # opening a FIFO would block
            return None
        found = np.load(place, mmap_mode="r", allow_pickle=False)  # refuses a truncated file
        if found.dtype != np.uint8 or found.ndim != 4 or len(found) != count:
            return None
        return torch.from_numpy(np.array(found))
    except (OSError, ValueError, EOFError):
        return None


def _keep(places: Sequence[Path], images: Tensor) -> None:
    """Write decoded images to the first place that can be written, or to none."""
    for place in places:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(place) as beside, beside.open("wb") as file:
                np.save(file, images.numpy())
            form, _, _ = place.name.rpartition("_")
            for older in place.parent.glob(f"{form}_*.npy"):  # of image files that have changed
                if older != place:
                    older.unlink()
            return


def _describe(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"
