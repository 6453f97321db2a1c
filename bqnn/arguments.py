"""Errors that name arguments or configuration keys, and checks of numbers."""

import math
import numbers
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import Parameter, signature
from typing import Any

from bqnn.text import short


class NamesArguments(Exception):
    """Base class of errors whose message names arguments.

    Args:
        message: One line with the arguments, their values, the reason and the remedy.
        names: The arguments that the message names. A dictionary entry follows its argument after
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
        # Not a part of a path, nor text in quotes.
        pattern = rf"(?<![\w./-])({words})(?![\w./'-])"
        self.args = (re.sub(pattern, lambda match: key(match[0]), str(self)),)
        self.names = tuple(map(key, self.names))


class ArgumentError(NamesArguments, ValueError):
    """An argument has an invalid value."""


class ArgumentTypeError(NamesArguments, TypeError):
    """An argument has a value of an invalid type."""


@contextmanager
def renamed(key: Callable[[str], str]) -> Iterator[None]:
    """Replace the arguments' names by `key(name)` in errors that the body raises."""
    try:
        yield
    except NamesArguments as error:
        error.rename(key)
        raise


def prefixed(group: str) -> AbstractContextManager[None]:
    """Prefix the arguments' names with a configuration group in errors that the body raises.

    Examples:
        >>> with prefixed("method"):
        ...     raise ArgumentError("rate=2: a share is below 1", "rate")
        Traceback (most recent call last):
        bqnn.arguments.ArgumentError: method.rate=2: a share is below 1
    """
    return renamed(lambda name: f"{group}.{name}")


def keywords(called: Callable[..., Any]) -> set[str]:
    """Return the names of all arguments of a function, or of a class.

    A class with `**options` also accepts the arguments of its bases.

    Examples:
        >>> class Base:
        ...     def __init__(self, *, rate: float) -> None: ...
        >>> class Derived(Base):
        ...     def __init__(self, *, width: int, **options: float) -> None: ...
        >>> sorted(keywords(Derived))
        ['rate', 'width']
    """
    takers = called.__mro__ if isinstance(called, type) else [called]
    names: set[str] = set()
    for taker in takers:
        parameters = signature(taker).parameters.values()
        names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
            break
    return names


def required(called: Callable[..., Any]) -> set[str]:
    """Return the names of the required arguments of a function or class.

    Examples:
        >>> required(lambda rate, width=3: rate)
        {'rate'}
    """
    parameters = signature(called).parameters.values()
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return {p.name for p in parameters if p.default is p.empty and p.kind in kinds}


def takes_any(called: Callable[..., Any]) -> bool:
    """Return whether a function or class accepts arguments of any name.

    Examples:
        >>> takes_any(lambda **options: options)
        True
    """
    return any(p.kind is Parameter.VAR_KEYWORD for p in signature(called).parameters.values())


def real_number(
    name: str,
    value: object,
    reason: str,
    least: float = -math.inf,
    most: float = math.inf,
    without: tuple[float, ...] = (),
) -> float:
    """Check a real number and convert it to a float.

    Args:
        name: The name of the argument.
        value: A number of Python or NumPy.
        reason: The purpose of the number and the valid choices, for the error message.
        least: The lower bound.
        most: The upper bound.
        without: The bounds that the range excludes.

    Returns:
        The number, which is finite and in the range.

    Raises:
        ArgumentTypeError: The value is not a number, such as a string, None, True or a tensor.
        ArgumentError: The number is NaN, infinite or out of the range.

    Examples:
        >>> real_number("rate", 1.5, "choose 0 to 1", 0, 1)
        Traceback (most recent call last):
        bqnn.arguments.ArgumentError: rate=1.5: choose 0 to 1
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ArgumentTypeError(f"{name}={short(value)} is not a number: {reason}", name)
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of floats
        number = math.inf
    if not (math.isfinite(number) and least <= number <= most) or number in without:
        raise ArgumentError(f"{name}={short(_plain(value))}: {reason}", name)
    return number


def whole_number(name: str, value: object, reason: str, least: int, most: float = math.inf) -> int:
    """Check a whole number and convert it to an int. See `real_number` for the arguments.

    Returns:
        The number, which is in the range.

    Raises:
        ArgumentTypeError: The value is not an integer, such as 4.0, a string, None, True or a
            tensor.
        ArgumentError: The number is out of the range.

    Examples:
        >>> whole_number("num_samples", 0, "choose 1 or more", 1)
        Traceback (most recent call last):
        bqnn.arguments.ArgumentError: num_samples=0: choose 1 or more
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ArgumentTypeError(
            f"{name}={short(_plain(value))} is not a whole number: {reason}", name
        )
    number = int(value)
    if not least <= number <= most:
        raise ArgumentError(f"{name}={short(number)}: {reason}", name)
    return number


def _plain(value: object) -> object:
    """Convert a NumPy number to a Python number, which `short` can show."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, int) else value
