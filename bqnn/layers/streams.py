"""Where random numbers start: a generator seed for each purpose of a job's seed."""

import hashlib
from enum import IntEnum

import torch

NUMBERS = 2**27  # of a purpose: epochs, draws


class Stream(IntEnum):
    """What random numbers are for. No two purposes of one seed share their numbers."""

    WEIGHTS = 0  # the initial weights
    TRAINING = 1  # noise and augmentation, by epoch
    ORDER = 2  # of the rows, by epoch
    VALIDATION = 3  # which rows are held out
    EVALUATION = 4  # by draw
    CALIBRATION = 5
    COMPARISON = 6  # of an int8 network with its simulation


def stream_seed(seed: int, stream: Stream, number: int = 0, rank: int = 0) -> int:
    """The seed of the generator for a purpose, and a number within it (an epoch, a draw).

    torch's CPU generator reads 32 bits of its seed. The purposes and numbers of one job take
    disjoint parts of them, from a start that is a hash of the job's seed (and rank): within a job
    all are different, and two jobs meet by chance alone.

    >>> stream_seed(0, Stream.EVALUATION, 1) - stream_seed(0, Stream.EVALUATION, 0)
    1
    """
    if not 0 <= number < NUMBERS:
        raise ValueError(f"number={number} of a random stream: choose 0 to {NUMBERS - 1}")
    start = hashlib.sha256(f"{seed}/{rank}".encode()).digest()[:4]
    return (int.from_bytes(start) + stream * NUMBERS + number) % 2**32


def stream_generator(seed: int, stream: Stream, number: int = 0) -> torch.Generator:
    """A generator on the CPU of its own, at the start of a stream."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, number))


def reseed(device: torch.device, seed: int, stream: Stream, number: int = 0, rank: int = 0) -> None:
    """Put torch's global generators of the CPU and of `device` at the start of a stream.

    `torch.manual_seed` starts every kind of device there might be, and for those that are not
    in use it keeps the call and its stack for later: 0.8 ms and a leak each time.
    """
    mixed = stream_seed(seed, stream, number, rank)
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed)
