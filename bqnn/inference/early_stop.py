"""Early stop: rows whose prediction has settled make no more draws."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class EarlyDraws(NamedTuple):
    """Draws of rows that may have made different numbers of them.

    Attributes:
        samples: Draws of the output [S, N, num_outputs]. Those that a row did not make are NaN.
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
