"""Atomic file writes, and safe opening of untrusted paths."""

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
    """Open a regular file for reading bytes.

    Other files are refused: reading a FIFO can block forever, and reading a device may never end.

    Args:
        path: The path of the file. Symbolic links are followed.

    Returns:
        The open file.

    Raises:
        ValueError: The path is a FIFO, a socket or a device. The message does not repeat the path.
        OSError: The file does not exist, is a folder, or cannot be read.

    Examples:
        >>> with open_regular("README.md") as file:
        ...     file.read(6)
        b'# bqnn'
    """
    # Without O_NONBLOCK, opening a FIFO would block until a process opens it for writing.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NONBLOCK))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise ValueError("it is not a regular file")


_NONBLOCK: int = getattr(os, "O_NONBLOCK", 0)  # Windows has neither this flag nor FIFOs


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Replace a file atomically: write to a temporary path, which is renamed on success.

    If the body raises an exception, the temporary file is deleted and `path` stays unchanged.

    Args:
        path: The file to create or replace. Its folder must exist.

    Yields:
        A temporary path in the same folder. The body writes to it.

    Raises:
        OSError: The disk is full, or the folder is read-only or missing.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "notes.txt")
        ...     with written_beside(path) as temporary:
        ...         size = temporary.write_text("done")
        ...         print(path.exists())
        ...     print(path.read_text())
        False
        done
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        with suppress(OSError):  # the folder may no longer exist
            beside.unlink()


def append_text(path: Path, text: str) -> None:
    """Append text to a file completely, or leave the file unchanged.

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
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
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> OSError:
    return OSError(
        f"{path} cannot be written ({error.strerror or error}) and is unchanged; free some space, "
        "or choose another folder"
    )


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file by `text`, atomically and in UTF-8.

    Raises:
        OSError: See `written_beside`.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "notes.txt")
        ...     write_text(path, "two runs")
        ...     path.read_text()
        'two runs'
    """
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write indented JSON atomically.

    Raises:
        ValueError: The content has a NaN or an infinity, which JSON cannot represent.
        OSError: See `written_beside`.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "metrics.json")
        ...     write_json(path, {"test/nll": 0.25})
        ...     json.loads(path.read_text())
        {'test/nll': 0.25}
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file atomically.

    Args:
        path: The file.
        rows: At least one row. All rows have the keys of the first one, which are the columns.

    Raises:
        OSError: See `written_beside`.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "metrics.csv")
        ...     write_csv(path, [{"epoch": 0, "nll": 0.5}, {"epoch": 1, "nll": 0.25}])
        ...     path.read_text().splitlines()
        ['epoch,nll', '0,0.5', '1,0.25']
    """
    with written_beside(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
