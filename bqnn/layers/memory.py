"""Find parameters and buffers of a network that share memory."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Owned(NamedTuple):
    """A parameter or buffer with its module and its name in the network."""

    name: str
    module: nn.Module
    tensor: Tensor


def shared(net: nn.Module) -> Iterator[tuple[Owned, Owned]]:
    """Return pairs of parameters and buffers, at least one a parameter, that share elements.

    These are one tensor under two names, or views: `a.data = b.data`, `nn.Parameter(b.t())`, a part
    of a larger one. Parts of one memory that have no number in common, as vector_to_parameters and
    recurrent layers make them, are not shared. Tensors without memory (on the meta device, empty,
    lazy) are compared by identity.
    """
    owned = [
        Owned(f"{path}.{name}" if path else name, module, tensor)
        for path, module in net.named_modules()
        for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items())
        if tensor is not None
    ]
    spans = sorted((*_span(one.tensor), index) for index, one in enumerate(owned))
    for place, (device, _, end, index) in enumerate(spans):
        for other_device, other_start, _, other_index in spans[place + 1 :]:
            if other_device != device or other_start >= end:
                break
            first, second = (owned[each] for each in sorted((index, other_index)))
            parameters = [one for one in (first, second) if isinstance(one.tensor, nn.Parameter)]
            if parameters and _have_common(first.tensor, second.tensor):
                yield first, second


def is_one(first: Owned, second: Owned) -> bool:
    """Return whether a `shared` pair has all elements in common."""
    return _span(first.tensor) == _span(second.tensor)


def _span(x: Tensor) -> tuple[str, int, int]:
    """The device of a tensor, and where its memory starts and ends."""
    if is_lazy(x) or x.layout != torch.strided or x.numel() == 0 or x.data_ptr() == 0:
        return "none", id(x), id(x) + 1
    return str(x.device), x.data_ptr(), x.data_ptr() + _length(x) * x.element_size()


def _length(x: Tensor) -> int:
    """How many numbers lie between the first and the last of a tensor, both included."""
    return 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))


def _have_common(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors whose spans overlap have a number in common."""
    if x is y:
        return True
    start, size = min(x.data_ptr(), y.data_ptr()), x.element_size()
    offsets = [each.data_ptr() - start for each in (x, y)]
    if y.element_size() != size or any(offset % size for offset in offsets):
        return True  # one is seen as another type
    first, second = (offset // size for offset in offsets)
    mask = torch.zeros(max(first + _length(x), second + _length(y)), dtype=torch.bool)
    mask.as_strided(x.shape, x.stride(), first).fill_(True)
    return bool(mask.as_strided(y.shape, y.stride(), second).any())
