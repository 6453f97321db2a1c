"""Errors that name arguments, and the configuration's keys in their place."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


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
