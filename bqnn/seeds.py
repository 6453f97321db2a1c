"""Seeds of random streams: one for each purpose, made of the seed of a run."""

import hashlib
from enum import IntEnum

NUMBERS = 2**27  # of a purpose: epochs, draws


class Stream(IntEnum):
    """What random numbers are for. The values are part of seeds: never change or reuse one."""

    INITIAL_WEIGHTS = 0
    TRAINING = 1  # noise, masks and augmentation; number: epoch
    ORDER = 2  # of the training rows; number: epoch
    VALIDATION_SPLIT = 3
    EVALUATION_WEIGHTS = 4  # number: draw
    EVALUATION_MASKS = 5  # number: draw
    CALIBRATION = 6
    FINE_TUNING = 7  # as TRAINING
    FINE_TUNING_ORDER = 8  # as ORDER
    COMPARISON = 9  # of an int8 network with its simulation


def stream_seed(seed: int, stream: Stream, number: int = 0, rank: int = 0) -> int:
    """The seed of the generator for a purpose, and a number within it (an epoch, a draw).

    torch's CPU generator reads 32 bits of its seed. The purposes and numbers of one run take
    disjoint parts of them, from a start that is a hash of the run's seed and the rank: within a
    run all are different, and two runs meet by chance alone.

    Args:
        seed: That of the run, 0 to 2**63 - 1.
        stream: What the random numbers are for.
        number: Which of the streams for that purpose, 0 to 2**27 - 1.
        rank: Of several processes that train one model.

    >>> stream_seed(0, Stream.ORDER, 1) == stream_seed(1, Stream.ORDER, 0)
    False
    """
    if not 0 <= number < NUMBERS:
        raise ValueError(f"number={number} of a random stream: choose 0 to {NUMBERS - 1}")
    start = hashlib.sha256(f"{seed}/{rank}".encode()).digest()[:4]
    return (int.from_bytes(start) + stream * NUMBERS + number) % 2**32
