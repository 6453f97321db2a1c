"""Errors that name arguments, the configuration's keys in their place, and checks of numbers."""

import math
import numbers
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from bqnn.text import short


class NamesArguments(Exception):
    """Base class of errors whose message names arguments.

    Args:
        message: One line: the arguments with their values, the reason, the remedy.
        names: The arguments in the message. An entry of a dictionary is joined to the argument by
            a dot, as in `optimizer.lr`.
    """

    def __init__(self, message: str, *names: str) -> None:
        super().__init__(message)
        self.names = names

    def rename(self, key: Callable[[str], str]) -> None:
        """Replace each name in the message by `key(name)`."""
        if not self.names:
            return
        words = "|".join(map(re.escape, self.names))
        pattern = rf"(?<![\w.])({words})(?![\w.'])"
        self.args = (re.sub(pattern, lambda match: key(match[0]), str(self)),)
        self.names = tuple(map(key, self.names))


class ArgumentError(NamesArguments, ValueError):
    """A value that an argument does not take."""


class ArgumentTypeError(NamesArguments, TypeError):
    """A value of a kind that an argument does not take."""


@contextmanager
def renamed(key: Callable[[str], str]) -> Iterator[None]:
    """Replace each argument's name in errors from inside by `key(name)`."""
    try:
        yield
    except NamesArguments as error:
        error.rename(key)
        raise


def prefixed(group: str) -> AbstractContextManager[None]:
    """Put a group of the configuration in front of each argument's name in errors from inside.

    Example:
        >>> with prefixed("method"):
        ...     raise ArgumentError("rate=2: a share is below 1", "rate")
        Traceback (most recent call last):
        bqnn.arguments.ArgumentError: method.rate=2: a share is below 1
    """
    return renamed(lambda name: f"{group}.{name}")


def real_number(
    name: str,
    value: object,
    reason: str,
    least: float = -math.inf,
    most: float = math.inf,
    without: tuple[float, ...] = (),
) -> float:
    """A finite number in a range, as a float.

    Args:
        name: what the number is called where it is set.
        value: of Python or NumPy.
        reason: what the number is for and what to choose, for the message.
        least: the lower end of the range.
        most: the upper end.
        without: the ends that do not belong to it.

    Raises:
        TypeError: it is no number: a text, None, True, a tensor.
        ValueError: it is NaN, infinite or out of the range.

    >>> real_number("rate", 1.5, "choose 0 to 1", 0, 1)
    Traceback (most recent call last):
    bqnn.arguments.ArgumentError: rate=1.5: choose 0 to 1
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ArgumentTypeError(f"{name}={short(value)} is no number: {reason}", name)
    try:
        number = float(value)
    except OverflowError:  # a whole number that no float can hold
        number = math.inf
    if not (math.isfinite(number) and least <= number <= most) or number in without:
        raise ArgumentError(f"{name}={short(_plain(value))}: {reason}", name)
    return number


def whole_number(name: str, value: object, reason: str, least: int, most: float = math.inf) -> int:
    """A whole number in a range, as an int; the arguments are those of `real_number`.

    Raises:
        TypeError: it is of another kind: 4.0, a text, None, True, a tensor.
        ValueError: it is out of the range.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ArgumentTypeError(f"{name}={short(_plain(value))} is no whole number: {reason}", name)
    number = int(value)
    if not least <= number <= most:
        raise ArgumentError(f"{name}={short(number)}: {reason}", name)
    return number


def _plain(value: object) -> object:
    """NumPy's numbers, which messages know nothing of, as those of Python."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, int) else value
