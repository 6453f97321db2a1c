"""Files that are either whole or not there, and opening what may be no file."""

import csv
import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read its bytes, if it is a regular one.

    Anything else could wait for ever (a FIFO) or have no end (a device).

    Raises:
        ValueError: It is a FIFO, a socket or a device; the message does not repeat the path.
        OSError: There is none, it is a folder, or it may not be read.
    """
    # Without O_NONBLOCK opening a FIFO would wait for its writer.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NONBLOCK))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise ValueError("it is no regular file")


_NONBLOCK: int = getattr(os, "O_NONBLOCK", 0)  # Windows has none, and no FIFOs to open


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` once all went well and vanishes otherwise.

    OSError, in one line: the disk is full, the folder is read-only or gone.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        with suppress(OSError):  # it may be the folder that is gone
            beside.unlink()


def append_text(path: Path, text: str) -> None:
    """Add text to the end of a file: all of it, or nothing with the OSError of `written_beside`."""
    data = text.encode()
    try:
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> OSError:
    return OSError(
        f"{path} cannot be written ({error.strerror or error}), and is as it was before; make "
        "room there, or choose another folder"
    )


def write_text(path: Path, text: str) -> None:
    """Make `text` all that the file holds."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write indented JSON; NaN and infinity are a ValueError, since JSON has neither."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a header and a line per row; the first row has the columns, all others the same."""
    with written_beside(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
