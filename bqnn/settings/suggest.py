"""Suggest the nearest name to a mistyped one."""

from collections.abc import Iterable
from difflib import SequenceMatcher

SIMILAR = 0.6  # the least similarity of a suggestion, from 0 to 1


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Find the name that is most similar to a mistyped name, or to one without its groups.

    Args:
        name: The mistyped name.
        names: The valid names.

    Returns:
        The most similar name, or None if none is similar.

    Examples:
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
    """Return a suggestion for an error message, or an empty string if no name is similar."""
    found = nearest(name, names)
    return "" if found is None else f"; did you mean {found}?"
