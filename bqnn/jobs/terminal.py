"""Printing and logging without secrets or escape sequences; a broken stream never fails a job."""

import contextlib
import functools
import io
import logging
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

from bqnn.jobs.secrets import mask
from bqnn.text import printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def presentable(text: str) -> str:
    """Mask secrets and escape unprintable characters in a text of any number of lines."""
    return "\n".join(map(printable, mask(text).split("\n")))


class PresentableFormatter(logging.Formatter):
    """Formats a log record, its traceback too, as `presentable` text."""

    def format(self, record: logging.LogRecord) -> str:
        return presentable(super().format(record))


def say(text: str, error: bool = False, end: str = "\n") -> None:
    """Print a text on standard output or standard error; a broken stream is ignored.

    The text is made `presentable`; characters that the stream's encoding lacks are escaped, too.
    Nothing happens where the stream is closed, its reader is gone (``| head``) or its disk is full.
    """
    stream = sys.stderr if error else sys.stdout
    # OSError: a broken pipe, a full disk; ValueError: the stream was closed; None: never opened.
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            encoding = stream.encoding or "utf-8"
            text = presentable(text).encode(encoding, "backslashreplace").decode(encoding)
            print(text, end=end, file=stream, flush=True)


@functools.cache
def say_once(text: str) -> None:
    """Print a text on standard error, unless this process has done so before."""
    say(text, error=True)


def protect_output() -> None:
    """Make all later printing, by any library, ignore broken streams as `say` does.

    A training is worth more than its progress bar: it goes on when its terminal is gone, and its
    results are in its folder. Streams that were replaced, as pytest and notebooks do, stay.
    """
    _occupy_closed_descriptors()
    sys.stdout = _protected(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _protected(sys.stderr, sys.__stderr__, 2)


class _Forgiving(io.FileIO):
    """Drops what cannot be written."""

    def write(self, data: "ReadableBuffer", /) -> int:
        with contextlib.suppress(OSError):
            while (written := super().write(data)) is None:  # it does not block, and is full
                select.select([], [self], [])
            return written
        return len(memoryview(data).cast("B"))


def _protected(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:
        encoding, is_flushed = None, True
    elif stream is original and isinstance(_raw(stream), io.FileIO):
        say("", error=descriptor == 2, end="")  # what it still holds
        assert isinstance(stream, io.TextIOWrapper)
        encoding, is_flushed = stream.encoding, stream.line_buffering or stream.write_through
    else:
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(descriptor, "w", closefd=False)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=is_flushed,
    )


def _raw(stream: TextIO) -> object:
    buffer = getattr(stream, "buffer", None)  # with python -u it is the file itself
    return getattr(buffer, "raw", buffer)


def _occupy_closed_descriptors() -> None:
    """Open /dev/null in place of standard streams that are closed (``>&-``).

    The next file to be opened would get the number, and whatever is printed.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is taken, which is this one.
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
