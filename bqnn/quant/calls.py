"""Replace calls of functions by the modules that quantization knows."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bqnn.layers.markers import Add, AvgPool, Cat, SpatialMean
from bqnn.layers.trace import caller_of, function_of
from bqnn.quant.traced import Traced, replace_call

Call = tuple[nn.Module, Sequence[fx.Node]] | None  # a module and its inputs; None: there is none


def _relu(input: fx.Node, inplace: bool = False) -> Call:
    return nn.ReLU(), [input]


def _relu6(input: fx.Node, inplace: bool = False) -> Call:
    return nn.ReLU6(), [input]


def _hardtanh(
    input: fx.Node, min_val: float = -1, max_val: float = 1, inplace: bool = False
) -> Call:
    return _clamp(input, min_val, max_val)


def _clamp(input: fx.Node, min: float | None = None, max: float | None = None) -> Call:
    if min != 0 or max not in (None, 6):
        return None
    return (nn.ReLU() if max is None else nn.ReLU6()), [input]


def _add(input: Any, other: Any, *, alpha: float = 1) -> Call:
    both = isinstance(input, fx.Node) and isinstance(other, fx.Node)
    return (Add(relu=False), [input, other]) if both and alpha == 1 else None


def _cat(tensors: Any, dim: int = 0) -> Call:
    return (Cat(dim), tensors) if isinstance(tensors, list | tuple) else None


def _avg_pool2d(input: fx.Node, kernel_size: Any, *args: Any, **options: Any) -> Call:
    return AvgPool(nn.AvgPool2d(kernel_size, *args, **options)), [input]


def _adaptive_avg_pool2d(input: fx.Node, output_size: Any) -> Call:
    return AvgPool(nn.AdaptiveAvgPool2d(output_size)), [input]


def _mean(input: fx.Node, dim: Any = None, keepdim: bool = False) -> Call:
    dims = set(dim) if isinstance(dim, list | tuple) else set()
    is_spatial = dims in ({2, 3}, {-2, -1}, {2, -1}, {-2, 3})
    return (AvgPool(SpatialMean(keepdim)), [input]) if is_spatial else None


ACTIVATIONS: Mapping[Any, Callable[..., Call]] = {
    F.relu: _relu,
    F.relu_: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    Tensor.relu: _relu,
    Tensor.relu_: _relu,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.hardtanh_: _hardtanh,
    torch.clamp: _clamp,
    Tensor.clamp: _clamp,
    Tensor.clamp_: _clamp,
    Tensor.clamp_min: _clamp,
    Tensor.clamp_min_: _clamp,
}
SUMS_AND_POOLS: Mapping[Any, Callable[..., Call]] = {
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    Tensor.add: _add,
    Tensor.add_: _add,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.concatenate: _cat,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    torch.mean: _mean,
    Tensor.mean: _mean,
}


def replace_calls(
    net: Traced, nodes: Sequence[fx.Node], makers: Mapping[Any, Callable[..., Call]]
) -> dict[fx.Node, fx.Node]:
    """Replace calls of functions by calls of modules that compute the same.

    Args:
        net: The network.
        nodes: The calls to look at.
        makers: For each function, a function with its arguments that returns a module and its
            inputs, or None.

    Returns:
        The new call of each replaced one.
    """
    replaced = {}
    for node in nodes:
        maker = makers.get(function_of(node)) if node.op.startswith("call_") else None
        if maker is None or node.op == "call_module":
            continue
        try:
            call = maker(*node.args, **node.kwargs)
        except TypeError:  # options that no module has
            continue
        if call is not None:
            module, inputs = call
            replaced[node] = replace_call(net, node, module, inputs, caller_of(node))
    return replaced


def pass_by_position(net: Traced) -> None:
    """Pass the first input of each call by position, not as the keyword `input`."""
    for node in net.graph.nodes:
        if node.op.startswith("call_") and not node.args and "input" in node.kwargs:
            options = dict(node.kwargs)
            node.args = (options.pop("input"),)
            node.kwargs = options
