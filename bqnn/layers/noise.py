"""Gaussian noise and coins, drawn as fast as the CPU can.

While a draw is held (`bqnn.layers.draws`) they come from its generator, which is on the CPU, and
are copied to the device: the same draw is the same network on every device and in every thread.
Otherwise they come from torch's global generators.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from bqnn.layers.draws import held_generator

NUM_PARTS = 4  # that a large tensor is drawn in, at the same time
MIN_PARALLEL = 2**20


def noise_like(x: Tensor, std: float = 1.0) -> Tensor:
    """N(0, std^2) noise of the shape, memory layout and device of `x`.

    From torch's global generators the numbers are drawn into memory in order and then seen in the
    layout of `x`: `normal_` on channels_last memory is many times slower on the CPU. From the
    generator of a draw they are in the order of the shape, so that a draw is the same network in
    every layout.

    `normal_` uses one core only, so large tensors on the CPU are drawn in four parts, each from a
    generator that a common one seeds: the same numbers on any number of cores.
    """
    generator = held_generator()
    if generator is None:
        eps = torch.empty_like(x)
        _fill(in_memory_order(eps), std, None)
        return eps
    drawn = torch.empty(x.shape, dtype=x.dtype, device=generator.device)
    _fill(drawn, std, generator)
    return torch.empty_like(x).copy_(drawn)


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
    generator = held_generator()
    device = x.device if generator is None else generator.device
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    threshold = round(probability * 2**16) - 2**15
    return (words.view(torch.int16)[: x.numel()] < threshold).view(x.shape).to(x.device)


def _fill(eps: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Draw N(0, std^2) into a tensor, in the order of its dimensions."""
    if eps.device.type != "cpu" or eps.numel() < MIN_PARALLEL or not eps.is_contiguous():
        eps.normal_(std=std, generator=generator)
        return

    def draw(part: Tensor, seed: int) -> None:
        part.normal_(std=std, generator=torch.Generator().manual_seed(seed))

    seeds = torch.randint(2**32, (NUM_PARTS,), generator=generator).tolist()
    list(_threads().map(draw, eps.view(-1).chunk(NUM_PARTS), seeds))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_PARTS, thread_name_prefix="noise")
