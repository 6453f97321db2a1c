"""Operations in float32, before the integers of a network begin and after they end."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bqnn.layers.linear_map import Geometry
from bqnn.layers.markers import SpatialMean
from bqnn.quant.onnx.exact import attributes_of
from bqnn.quant.onnx.graph import Graph
from bqnn.quant.onnx.pooling import Averages
from bqnn.quant.onnx.values import Value

AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, SpatialMean)


def write_module(graph: Graph, x: Value, module: nn.Module, name: str) -> str:
    """Write a module in float32.

    Args:
        graph: The graph to write into.
        x: Its input.
        module: The module.
        name: Its name in the network.

    Returns:
        The name of its output.

    Raises:
        TypeError: The module cannot be exported.
    """
    kind = type(module)
    if kind is nn.Linear:
        return _linear(graph, x.name, module)
    if kind is nn.Conv2d:
        return _conv(graph, x.name, module)
    if kind in AVERAGES:
        return write_average(graph, x.name, Averages.of(module, x.example, name))
    if kind in (nn.Softmax, nn.LogSoftmax):
        return graph.call(kind.__name__, x.name, axis=_axis(module.dim))  # type: ignore[arg-type]
    raise TypeError(
        f"export: {name}, a {kind.__name__}, cannot be exported; in float, a file can have "
        "Linear, Conv2d, ReLU, max and average pools, Flatten, Softmax and LogSoftmax"
    )


def _linear(graph: Graph, x: str, layer: Any) -> str:
    out = graph.call("MatMul", x, graph.constant(layer.weight.detach().t().numpy()))
    if layer.bias is None:
        return out
    return graph.call("Add", out, graph.constant(layer.bias.detach().numpy()))


def _conv(graph: Graph, x: str, layer: Any) -> str:
    parameters = [layer.weight, *([] if layer.bias is None else [layer.bias])]
    constants = [graph.constant(each.detach().numpy()) for each in parameters]
    return graph.call("Conv", x, *constants, **attributes_of(Geometry.of(layer)))


def write_average(graph: Graph, x: str, averages: Averages) -> str:
    """Write an average pooling in float32."""
    if averages.is_global:
        means = graph.call("GlobalAveragePool", x)
    else:
        shares = averages.windows.float()
        for divisor in averages.divisors:
            shares = shares / divisor
        rows = graph.call("Reshape", x, graph.constant(averages.flat_shape))
        means = graph.call("MatMul", rows, graph.constant(shares.numpy()))
    return graph.call("Reshape", means, graph.constant(averages.output_shape))


def _log_softmax(input: Any, dim: int | None = None, *_: Any, **__: Any) -> tuple[str, int]:
    return "LogSoftmax", _axis(dim)


def _softmax(input: Any, dim: int | None = None, *_: Any, **__: Any) -> tuple[str, int]:
    return "Softmax", _axis(dim)


def _axis(dim: int | None) -> int:
    return -1 if dim is None else dim


# For each function, the operator and its axis for the arguments of a call.
SOFTMAXES: Mapping[Any, Callable[..., tuple[str, int]]] = {
    F.log_softmax: _log_softmax,
    torch.log_softmax: _log_softmax,
    Tensor.log_softmax: _log_softmax,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
}
POOLS = (F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, Tensor.mean)
