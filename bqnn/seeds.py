"""Seeds of random streams: one for each purpose, mixed from the seed of a run."""

import hashlib
from enum import IntEnum


class Stream(IntEnum):
    """What random numbers are for. The values are mixed into seeds: never change or reuse one."""

    INITIAL_WEIGHTS = 0
    TRAINING = 1  # noise, masks and augmentation; numbers: epoch, rank
    ORDER = 2  # of the training rows; number: epoch
    VALIDATION_SPLIT = 3
    EVALUATION_WEIGHTS = 4  # number: draw
    EVALUATION_MASKS = 5  # number: draw
    CALIBRATION = 6
    FINE_TUNING = 7  # as TRAINING
    FINE_TUNING_ORDER = 8  # as ORDER


def stream_seed(seed: int, stream: Stream, *numbers: int) -> int:
    """The generator seed of one stream of a run: 64 bits of a BLAKE2 hash of what is given.

    Args:
        seed: that of the run.
        stream: what the random numbers are for.
        numbers: which of the streams for that purpose, such as the epoch.

    Two different streams, of one run or of two, get the same 64 bits by a chance of 2**-64. torch's
    generators on the CPU read the lower 32 bits only, and two of them start alike by a chance of
    2**-32.

    >>> stream_seed(0, Stream.ORDER, 1) == stream_seed(1, Stream.ORDER, 0)
    False
    """
    text = " ".join(map(str, (seed, int(stream), *numbers)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
