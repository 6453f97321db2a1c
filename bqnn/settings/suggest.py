"""The nearest name to a mistyped one."""

from collections.abc import Iterable
from difflib import SequenceMatcher

SIMILAR = 0.6  # of 1: the least similarity of a suggestion


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that a mistyped one, or one without its groups, was most probably meant to be.

    >>> nearest("method.lr", ["method.rate", "method.optimizer.lr", "seed"])
    'method.optimizer.lr'
    """
    last = name.rpartition(".")[2]

    def similarity(candidate: str) -> tuple[float, float]:
        own = candidate.rpartition(".")[2]
        return SequenceMatcher(None, last, own).ratio(), SequenceMatcher(
            None, name, candidate
        ).ratio()

    best = max(names, key=similarity, default=None)
    return best if best is not None and similarity(best)[0] >= SIMILAR else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The suggestion for an error message, or nothing where no name is near."""
    found = nearest(name, names)
    return "" if found is None else f"; did you mean {found}?"
