"""Seeds of the random streams of a run, one stream for each purpose."""

import hashlib
from enum import IntEnum

NUMBERS = 2**27  # the number of streams (epochs, draws) for each purpose


class Stream(IntEnum):
    """The purpose of random numbers. Seeds contain the values: never change or reuse one."""

    INITIAL_WEIGHTS = 0
    TRAINING = 1  # noise, masks and augmentation; number: epoch
    ORDER = 2  # order of the training rows; number: epoch
    VALIDATION_SPLIT = 3
    EVALUATION_WEIGHTS = 4  # number: draw
    EVALUATION_MASKS = 5  # number: draw
    CALIBRATION = 6
    FINE_TUNING = 7  # like TRAINING
    FINE_TUNING_ORDER = 8  # like ORDER
    COMPARISON = 9  # comparison of an int8 network with its simulation
    TEST_SPLIT = 10
    CONFORMAL = 11  # number: 0 for the rows of a threshold, 1 for others


def stream_seed(seed: int, stream: Stream, number: int = 0, rank: int = 0) -> int:
    """Compute the seed of a generator.

    torch's CPU generator uses 32 bits of its seed. The streams of a run have different seeds, at
    fixed offsets from a hash of the run's seed and the rank. Seeds of different runs are equal
    only by chance.

    Args:
        seed: The seed of the run, 0 to 2**63 - 1.
        stream: The purpose of the random numbers.
        number: The number of the stream for this purpose (an epoch or a draw), 0 to 2**27 - 1.
        rank: The rank of this process.

    Returns:
        A seed from 0 to 2**32 - 1.

    Raises:
        ValueError: `number` is out of range.

    Examples:
        >>> stream_seed(0, Stream.ORDER, 1) == stream_seed(1, Stream.ORDER, 0)
        False
    """
    if not 0 <= number < NUMBERS:
        raise ValueError(f"number={number}: too many random streams; choose 0 to {NUMBERS - 1}")
    start = hashlib.sha256(f"{seed}/{rank}".encode()).digest()[:4]
    return (int.from_bytes(start) + stream * NUMBERS + number) % 2**32
