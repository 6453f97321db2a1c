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
    """Yield pairs of tensors that share elements, at least one of them a parameter.

    A pair is one tensor under two names, or two views of one memory: `a.data = b.data`,
    `nn.Parameter(b.t())`, or a slice of a larger tensor. Disjoint parts of one memory, as
    vector_to_parameters and recurrent layers create them, are not shared. Tensors without memory
    (meta, empty or lazy) are compared by identity.

    Args:
        net: The network whose parameters and buffers are compared.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        >>> net[1].weight = net[0].weight
        >>> [(first.name, second.name) for first, second in shared(net)]
        [('0.weight', '1.weight')]
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
    """Return whether a pair of `shared` has all elements in common."""
    return _span(first.tensor) == _span(second.tensor)


def _span(x: Tensor) -> tuple[str, int, int]:
    """Return the device of a tensor, and the start and end address of its memory."""
    if is_lazy(x) or x.layout != torch.strided or x.numel() == 0 or x.data_ptr() == 0:
        return "none", id(x), id(x) + 1
    return str(x.device), x.data_ptr(), x.data_ptr() + _length(x) * x.element_size()


def _length(x: Tensor) -> int:
    """Return the number of memory cells from the first to the last element, both included."""
    return 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))


def _have_common(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors with overlapping spans share an element."""
    if x is y:
        return True
    start, size = min(x.data_ptr(), y.data_ptr()), x.element_size()
    offsets = [each.data_ptr() - start for each in (x, y)]
    if y.element_size() != size or any(offset % size for offset in offsets):
        return True  # a view with another dtype
    first, second = (offset // size for offset in offsets)
    mask = torch.zeros(max(first + _length(x), second + _length(y)), dtype=torch.bool)
    mask.as_strided(x.shape, x.stride(), first).fill_(True)
    return bool(mask.as_strided(y.shape, y.stride(), second).any())
