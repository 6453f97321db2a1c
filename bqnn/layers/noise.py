"""Gaussian noise and coins, drawn as fast as the CPU can, and where their generators start."""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

NUM_STREAMS = 4
MIN_PARALLEL = 2**20


def noise_like(x: Tensor, std: float = 1.0) -> Tensor:
    """N(0, std^2) noise of the shape and memory layout of `x`, from torch's global generator.

    The numbers are drawn into memory in order and then seen in the layout of `x`, since
    `normal_` on channels_last memory takes a path on the CPU that is many times slower. It also
    uses one core only, so large tensors on the CPU are drawn in four parts, each from a generator
    that the global one seeds: the same numbers on any number of cores.
    """
    eps = torch.empty_like(x)
    in_order = in_memory_order(eps)
    if eps.device.type != "cpu" or eps.numel() < MIN_PARALLEL or not in_order.is_contiguous():
        in_order.normal_(std=std)
        return eps

    def draw(part: Tensor, seed: int) -> None:
        part.normal_(std=std, generator=torch.Generator().manual_seed(seed))

    seeds = torch.randint(2**32, (NUM_STREAMS,)).tolist()
    list(_threads().map(draw, in_order.view(-1).chunk(NUM_STREAMS), seeds))
    return eps


def in_memory_order(x: Tensor) -> Tensor:
    """Pictures or filters in channels_last as [N, H, W, C]; anything else as it is."""
    # With one channel both layouts are contiguous, and strides tell which one is meant.
    is_channels_last = (
        x.dim() == 4 and x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)
    )
    return x.permute(0, 2, 3, 1) if is_channels_last else x


def coins_like(x: Tensor, probability: float) -> Tensor:
    """True with this probability, rounded to a multiple of 2**-16: bool, the shape of `x`.

    Four coins share a 64-bit random number, which on the CPU takes a sixth of `bernoulli_`'s time.
    """
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None)
    threshold = round(probability * 2**16) - 2**15
    return (words.view(torch.int16)[: x.numel()] < threshold).view(x.shape)


def reseed(device: torch.device, seed: int, stream: int = 0) -> None:
    """Start torch's global generators of the CPU and of `device` from a seed and a stream number.

    Streams of one seed, and streams of one number and two seeds, have nothing in common.
    `torch.manual_seed` starts every kind of device there might be, and for those that are not
    in use it keeps the call and its stack for later: 0.8 ms and a leak each time.
    """
    mixed = (seed * 1_000_003 + stream) % 2**32  # the CPU's generator reads 32 bits
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_STREAMS, thread_name_prefix="noise")
