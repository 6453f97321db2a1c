"""Fast Gaussian noise and Bernoulli samples on the CPU."""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

NUM_STREAMS = 4
MIN_PARALLEL = 2**20


def noise_like(x: Tensor, std: float = 1.0) -> Tensor:
    """N(0, std^2) noise of the shape and memory layout of `x`, from torch's global generator.

    The numbers are drawn into memory in order and then seen in the layout of `x`, since
    `normal_` on channels_last memory takes a path on the CPU that is many times slower.
    """
    eps = torch.empty_like(x)
    in_order = in_memory_order(eps)
    if torch.compiler.is_compiling() or eps.device.type != "cpu" or not in_order.is_contiguous():
        in_order.normal_(std=std)
    else:
        _fill(in_order, torch.default_generator, std)
    return eps


def cpu_noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) noise of the shape, layout, type and device of `x`, from a generator of the CPU.

    The numbers are drawn in float32 in the order of the shape, so that they depend on neither
    device, nor type, nor layout.
    """
    eps = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    _fill(eps, generator)
    if x.is_contiguous() and x.dtype == eps.dtype:
        return eps.to(x.device)
    return torch.empty_like(x).copy_(eps)


def in_memory_order(x: Tensor) -> Tensor:
    """View channels_last images or filters as [N, H, W, C], and return other tensors unchanged."""
    # With one channel both layouts are contiguous, and strides tell which one is meant.
    is_channels_last = (
        x.dim() == 4 and x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)
    )
    return x.permute(0, 2, 3, 1) if is_channels_last else x


def coins_like(x: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """True with this probability: bool, the shape of `x` and on its device.

    The random number of a coin is a part of a 64-bit one, which on the CPU takes a fraction of
    `bernoulli_`'s time. It has 32 bits, or 64 where those would round a probability close to 0 or 1
    by more than a millionth of itself. A probability below 2^-64 is zero (2^-62 where torch.compile
    or torch.export traces).

    generator: of the CPU; by default the global one of the device of `x`.
    """
    if torch.compiler.is_compiling():  # which can trace neither `random_` nor views of other types
        # Not `bernoulli`: compiled, it compares with random numbers of 24 bits.
        return torch.randint(2**62, x.shape, device=x.device) < int(probability * 2**62)
    kind = torch.int32 if 2**-12 <= probability <= 1 - 2**-12 else torch.int64
    bits = 8 * kind.itemsize
    smallest_false = int(probability * 2**bits) - 2 ** (bits - 1)
    if smallest_false > torch.iinfo(kind).max:
        return torch.ones(x.shape, dtype=torch.bool, device=x.device)
    device = x.device if generator is None else generator.device
    words = torch.empty(-(-x.numel() * bits // 64), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    return (words.view(kind)[: x.numel()] < smallest_false).view(x.shape).to(x.device)


def reseed(device: torch.device, seed: int) -> None:
    """Start torch's global generators of the CPU and of `device`: see `bqnn.seeds.stream_seed`.

    `torch.manual_seed` starts every kind of device there might be, and for those that are not
    in use it keeps the call and its stack for later: 0.8 ms and a leak each time.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _fill(memory: Tensor, generator: torch.Generator, std: float = 1.0) -> None:
    """Draw N(0, std^2) into contiguous memory of the CPU.

    `normal_` uses one core only, so large tensors are drawn in four parts, each from a generator
    that the given one seeds: the same numbers on any number of cores.
    """
    if memory.numel() < MIN_PARALLEL:
        memory.normal_(std=std, generator=generator)
        return

    def draw(part: Tensor, seed: int) -> None:
        part.normal_(std=std, generator=torch.Generator("cpu").manual_seed(seed))

    seeds = torch.randint(2**32, (NUM_STREAMS,), generator=generator, device="cpu").tolist()
    list(_threads().map(draw, memory.view(-1).chunk(NUM_STREAMS), seeds))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_STREAMS, thread_name_prefix="noise")
