"""Operations that move elements within their rows, such as views, permutations and slices."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bqnn.quant.onnx.graph import Graph
from bqnn.quant.onnx.values import Value

Move = Callable[[Tensor], Any]


def write_move(graph: Graph, x: Value, move: Move, name: str) -> Value | list[Value]:
    """Write an operation that moves elements; what it does is measured.

    Args:
        graph: The graph to write into.
        x: The activation.
        move: The operation, as a function of the activation.
        name: The name of the operation, for errors.

    Returns:
        The output, or a list if the operation has several.

    Raises:
        TypeError: The operation mixes rows, or its size depends on their number.

    Examples:
        >>> graph = Graph()
        >>> moved = write_move(graph, Value("x", torch.zeros(3, 2, 5)), torch.nn.Flatten(), "flat")
        >>> graph.calls[0].operator, moved.example.shape
        ('Reshape', torch.Size([3, 10]))
    """
    found = move(x.example)
    moved = move(_places(x.example))
    if isinstance(found, Tensor):
        return _write(graph, x, move, found, moved, name)
    return [
        _write(graph, x, lambda t, i=i: move(t)[i], each, to, name)  # type: ignore[misc]
        for i, (each, to) in enumerate(zip(found, moved, strict=True))
    ]


def _write(graph: Graph, x: Value, move: Move, found: Tensor, places: Tensor, name: str) -> Value:
    rows, size = len(x.example), x.example[0].numel()
    starts = torch.arange(rows).mul_(size).view(-1, *[1] * (places.dim() - 1))
    if places.dim() == 0 or len(places) != rows or not torch.equal(places - starts, _rows(places)):
        raise TypeError(
            f"export: {name} changes the axis of the rows, and the number of rows of a file is "
            "free; keep the rows in the first dimension"
        )
    order = places[0].flatten()
    steps = None if x.steps is None else x.steps.flatten()[order].view(found.shape[1:])
    if torch.equal(order, torch.arange(size)):
        if found.shape == x.example.shape:
            return x.moved(x.name, found, steps)
        shape = graph.constant(np.array([-1, *found.shape[1:]], np.int64))
        return x.moved(graph.call("Reshape", x.name, shape), found, steps)
    axes = _axis_order(move, x.example.dim())
    if axes is not None and torch.equal(places, _places(x.example).permute(axes)):
        return x.moved(graph.call("Transpose", x.name, perm=axes), found, steps)
    flat = graph.call("Reshape", x.name, graph.constant(np.array([-1, size], np.int64)))
    taken = graph.call("Gather", flat, graph.constant(order.numpy()), axis=1)
    shape = graph.constant(np.array([-1, *found.shape[1:]], np.int64))
    return x.moved(graph.call("Reshape", taken, shape), found, steps)


def _places(x: Tensor) -> Tensor:
    """Number the elements of a tensor."""
    return torch.arange(x.numel(), dtype=torch.int64).view(x.shape)


def _rows(places: Tensor) -> Tensor:
    return places[:1].expand_as(places)


def _axis_order(move: Move, dims: int) -> tuple[int, ...] | None:
    """Return the order of the axes if the operation seems to only permute them.

    It is tried on sizes that differ; on others, it may also cut.
    """
    sizes = tuple(range(2, 2 + dims))
    try:
        out = move(torch.empty(sizes))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    axes = tuple(size - 2 for size in out.shape) if isinstance(out, Tensor) else ()
    return axes if sorted(axes) == list(range(dims)) else None
