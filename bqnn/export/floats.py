"""Operations in float32, before the integers of a network begin and after they end."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bqnn.export.exact import attributes_of
from bqnn.export.graph import Graph
from bqnn.export.pooling import Averages
from bqnn.layers.linear_map import Geometry


def write_linear(graph: Graph, x: str, layer: nn.Linear) -> str:
    """Write a linear layer in float32."""
    out = graph.call("MatMul", x, graph.constant(layer.weight.detach().t().numpy()))
    if layer.bias is None:
        return out
    return graph.call("Add", out, graph.constant(layer.bias.detach().numpy()))


def write_conv(graph: Graph, x: str, layer: nn.Conv2d) -> str:
    """Write a convolution in float32."""
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
