"""Early stop: rows whose prediction has settled make no more draws."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from bqnn.arguments import ArgumentError, real_number
from bqnn.text import short

USUAL_TOLERANCE = 0.02


class EarlyDraws(NamedTuple):
    """Draws of rows that may have made different numbers of them.

    Attributes:
        samples: Draws of the output [S, N, num_outputs], where S is the largest number of draws
            that a row made. Those that a row did not make are NaN.
        num_samples: The number of draws of each row [N]; a row made the first ones.
    """

    samples: Tensor
    num_samples: Tensor


def numbers_of_draws(max_samples: int) -> Iterator[int]:
    """Yield the numbers of draws after which rows are judged: 2, 4, 8, ... and `max_samples`.

    Examples:
        >>> list(numbers_of_draws(20))
        [2, 4, 8, 16, 20]
    """
    count = 2
    while count < max_samples:
        yield count
        count *= 2
    yield max_samples


def check_early_stop(num_samples: object, max_samples: object, tolerance: object) -> float | None:
    """Check the arguments of an early stop, of which `num_samples` and `max_samples` may be None.

    Returns:
        The tolerance; None for no early stop.

    Raises:
        TypeError: The tolerance is not a number.
        ValueError: The tolerance is negative or not finite, or the arguments contradict each other.

    Examples:
        >>> check_early_stop(None, 20, 0.02)
        0.02
    """
    if tolerance is None:
        if max_samples is not None:
            raise ArgumentError(
                f"max_samples={short(max_samples)} without tolerance: no row stops early; give "
                f"tolerance, such as {USUAL_TOLERANCE}, or num_samples",
                *("max_samples", "tolerance", "num_samples"),
            )
        return None
    reason = f"choose 0 or more, such as {USUAL_TOLERANCE}"
    checked = real_number("tolerance", tolerance, reason, 0)
    if num_samples is not None:
        raise ArgumentError(
            f"num_samples={short(num_samples)} with tolerance: a row makes up to max_samples; "
            "give max_samples instead of num_samples",
            *("num_samples", "max_samples", "tolerance"),
        )
    return checked
