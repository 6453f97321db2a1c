"""Numbers that a constructor is given: their kind and their range, in one check."""

import math
import numbers

from bqnn.text import short


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
    ValueError: rate=1.5: choose 0 to 1
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}={short(value)} is no number: {reason}")
    try:
        number = float(value)
    except OverflowError:  # a whole number that no float can hold
        number = math.inf
    if not (math.isfinite(number) and least <= number <= most) or number in without:
        raise ValueError(f"{name}={short(_plain(value))}: {reason}")
    return number


def whole_number(name: str, value: object, reason: str, least: int, most: float = math.inf) -> int:
    """A whole number in a range, as an int; the arguments are those of `real_number`.

    Raises:
        TypeError: it is of another kind: 4.0, a text, None, True, a tensor.
        ValueError: it is out of the range.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}={short(_plain(value))} is no whole number: {reason}")
    number = int(value)
    if not least <= number <= most:
        raise ValueError(f"{name}={short(number)}: {reason}")
    return number


def _plain(value: object) -> object:
    """NumPy's numbers, which messages know nothing of, as those of Python."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, int) else value
