"""Fast Gaussian noise and Bernoulli samples on the CPU."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

NUM_STREAMS = 4
MIN_PARALLEL = 2**20


def noise_like(x: Tensor, std: float = 1.0) -> Tensor:
    """Sample N(0, std^2) noise with the shape and memory layout of `x`, from the global generator.

    The noise is drawn into contiguous memory and then viewed in the layout of `x`, because
    `normal_` on channels_last memory is many times slower on the CPU.

    Args:
        x: A tensor with the shape, layout, dtype and device of the result.
        std: Standard deviation of the noise.
    """
    eps = torch.empty_like(x)
    in_order = in_memory_order(eps)
    if torch.compiler.is_compiling() or eps.device.type != "cpu" or not in_order.is_contiguous():
        in_order.normal_(std=std)
    else:
        _fill(in_order, torch.default_generator, std)
    return eps


def cpu_noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Sample N(0, 1) noise with the shape, layout, dtype and device of `x`, from a CPU generator.

    The numbers are drawn in float32 in the order of the dimensions, so they do not depend on
    device, dtype or layout.

    Args:
        x: A tensor with the shape, layout, dtype and device of the result.
        generator: CPU generator.
    """
    eps = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    _fill(eps, generator)
    if x.is_contiguous() and x.dtype == eps.dtype:
        return eps.to(x.device)
    return torch.empty_like(x).copy_(eps)


def in_memory_order(x: Tensor) -> Tensor:
    """View channels_last images or filters as [N, H, W, C], and return other tensors unchanged."""
    # A tensor with one channel is contiguous in both layouts; its strides show the intended one.
    is_channels_last = (
        x.dim() == 4 and x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)
    )
    return x.permute(0, 2, 3, 1) if is_channels_last else x


def coins_like(x: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """Sample booleans that are True with a probability, with the shape and device of `x`.

    Two samples share one 64-bit random number, which takes a fraction of the time of `bernoulli_`
    on the CPU. A sample uses 32 bits, or 64 bits if 32 would round a probability close to 0 or 1
    with a relative error above 1e-6. A probability below 2^-64 becomes 0 (below 2^-62 in a graph
    traced by torch.compile or torch.export).

    Args:
        x: A tensor with the shape and device of the result.
        probability: Probability of True, from 0 to 1.
        generator: CPU generator. The default is the global generator of the device of `x`.

    Examples:
        >>> coins_like(torch.zeros(3), 1.0)
        tensor([True, True, True])
    """
    if torch.compiler.is_compiling():  # `random_` and views of another dtype cannot be traced
        # `bernoulli` would have only 24 random bits when compiled.
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
    """Seed torch's global generators of the CPU and of `device`.

    `torch.manual_seed` seeds every device type. For types that are not in use it stores the call
    and its stack, which costs 0.8 ms and leaks memory each time.

    Args:
        device: The device in use.
        seed: The seed, see `bqnn.seeds.stream_seed`.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextmanager
def repeated_noise(device: torch.device) -> Iterator[None]:
    """Let the code after the context draw the random numbers of its body again.

    It restores torch's global generators of the CPU and of `device`.

    Args:
        device: The device in use.

    Examples:
        >>> with repeated_noise(torch.device("cpu")):
        ...     first = torch.randn(3)
        >>> torch.equal(torch.randn(3), first)
        True
    """
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type=device.type if others else "cuda"):
        yield


def _fill(memory: Tensor, generator: torch.Generator, std: float = 1.0) -> None:
    """Fill contiguous CPU memory with N(0, std^2) noise.

    `normal_` runs on one core. Large tensors are therefore filled in four parts, each with its own
    generator, seeded from the given one. The numbers do not depend on the number of cores.
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
