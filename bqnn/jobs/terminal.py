"""Print and log without secrets or escape sequences; a broken stream never fails a Job."""

import contextlib
import functools
import io
import logging
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

from bqnn.jobs.secrets import mask
from bqnn.text import one_line, printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

traceback_log = logging.getLogger("bqnn.traceback")  # conf/hydra sends it to the log file only


def presentable(text: str) -> str:
    """Mask secrets and escape unprintable characters.

    Args:
        text: A text of any number of lines.

    Returns:
        The masked text, with the same lines.
    """
    return "\n".join(map(printable, mask(text).split("\n")))


def describe(error: BaseException) -> str:
    """Describe an exception in one line, without secrets.

    Args:
        error: The exception.

    Returns:
        Its message. The name of its type comes first if the type is unexpected or the message is
        empty.

    Examples:
        >>> describe(ValueError("rate=2: too high"))
        'rate=2: too high'
        >>> describe(KeyError("rate"))
        "KeyError: 'rate'"
    """
    text = one_line(mask(str(error)))
    expected = (ValueError, TypeError, FloatingPointError, OSError)
    return text if text and isinstance(error, expected) else f"{type(error).__name__}: {text}"


def log_traceback(message: str, error: BaseException) -> None:
    """Write an exception with its traceback to the log file, and not to the terminal.

    Args:
        message: The line above the traceback.
        error: The exception.
    """
    with contextlib.suppress(OSError):  # the folder was removed
        traceback_log.error(message, exc_info=error)


class PresentableFormatter(logging.Formatter):
    """Format log records and their tracebacks as `presentable` text."""

    def format(self, record: logging.LogRecord) -> str:
        return presentable(super().format(record))


def say(text: str, error: bool = False, end: str = "\n") -> None:
    """Print a `presentable` text on standard output or standard error.

    Characters that the encoding of the stream lacks are escaped. The function does nothing if the
    stream is closed, its reader has ended (``| head``), or its disk is full.

    Args:
        text: The text to print.
        error: Whether to print on standard error.
        end: Printed after the text.
    """
    stream = sys.stderr if error else sys.stdout
    # OSError: broken pipe or full disk. ValueError: closed stream. None: never opened.
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            encoding = stream.encoding or "utf-8"
            text = presentable(text).encode(encoding, "backslashreplace").decode(encoding)
            print(text, end=end, file=stream, flush=True)


@functools.cache
def say_once(text: str) -> None:
    """Print a text on standard error once per process.

    Args:
        text: The text to print.
    """
    say(text, error=True)


def protect_output() -> None:
    """Make all later output, from any library, ignore broken streams as `say` does.

    A training continues without its terminal, because its results are in its folder. Streams that
    were replaced, for example by pytest or a notebook, are unchanged.
    """
    _occupy_closed_descriptors()
    sys.stdout = _protected(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _protected(sys.stderr, sys.__stderr__, 2)


class _Forgiving(io.FileIO):
    """A file that discards what it cannot write."""

    def write(self, data: "ReadableBuffer", /) -> int:
        with contextlib.suppress(OSError):
            while (written := super().write(data)) is None:  # a non-blocking stream is full
                select.select([], [self], [])
            return written
        return len(memoryview(data).cast("B"))


def _protected(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:
        encoding, is_flushed = None, True
    elif stream is original and isinstance(_raw(stream), io.FileIO):
        say("", error=descriptor == 2, end="")  # flush the stream
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
    buffer = getattr(stream, "buffer", None)  # with python -u, the buffer is the file itself
    return getattr(buffer, "raw", buffer)


def _occupy_closed_descriptors() -> None:
    """Open /dev/null in place of closed standard streams (``>&-``).

    Otherwise the next opened file would get the descriptor, and all printed text.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # os.open takes the lowest free descriptor, which is this one.
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
