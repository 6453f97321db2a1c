"""Seeds of random streams: one for each purpose, mixed from the seed of a run."""

from enum import IntEnum

from numpy.random import SeedSequence


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
    """The generator seed of one stream of a run: 64 bits, mixed by numpy's SeedSequence.

    Args:
        seed: that of the run, 0 to 2**63 - 1.
        stream: what the random numbers are for.
        numbers: which of the streams for that purpose, such as the epoch. Each is 0 or more.

    Two different streams, of one run or of two, get the same 64 bits by a chance of 2**-64. torch's
    generators on the CPU read the lower 32 bits only, and two of them start alike by a chance of
    2**-32.

    >>> stream_seed(0, Stream.ORDER, 1) == stream_seed(1, Stream.ORDER, 0)
    False
    """
    mixed = SeedSequence(seed, spawn_key=(int(stream), *numbers))
    low, high = mixed.generate_state(2).tolist()
    return int(low | high << 32)
