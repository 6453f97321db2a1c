"""The form of the engine onnxruntime: QLinearConv and QGemm, with biases in int32."""

from typing import Any

import numpy as np
import torch

from bqnn.quant.engines.contract import ActivationGrid
from bqnn.quant.engines.rounding import integer_bias
from bqnn.quant.onnx.exact import ExactForm, attributes_of, integers_of_weight
from bqnn.quant.onnx.graph import Graph
from bqnn.quant.onnx.values import Value
from bqnn.quant.simulated import SimulatedLayer

GEMM = "com.microsoft.QGemm"  # QLinearMatMul has no bias


class QLinearForm(ExactForm):
    """Writes layers as operators of ONNX Runtime that sum and requantize in one step.

    The sums, with a bias in int32, are multiplied by s_x s_w / s_y and rounded. All other modules
    are written as in `ExactForm`.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._unclipped: dict[str, tuple[str, int, int]] = {}

    def layer(self, x: Value, layer: SimulatedLayer) -> str:
        if layer.geometry is None and x.example.dim() != 2:
            return super().layer(x, layer)
        assert x.integers is not None
        graph, output = self.graph, ActivationGrid.of(layer.output_quant)
        factor, bias = layer.fold()
        quant = layer.weight_grid
        integers, zero = integers_of_weight(layer.weight_steps(factor), x.integers)
        scale = quant.scale.detach()
        inputs = [
            x.name,
            graph.constant(np.float32(x.integers.scale)),
            self._zero_point(x.integers),
        ]
        shift = ""
        if bias is not None:
            shifts = integer_bias(bias.detach(), scale * x.integers.scale)
            shift = graph.constant(shifts.to(torch.int32).numpy())
        rest = [
            graph.constant(scale.numpy() if quant.channels else scale[0].numpy()),
            graph.constant(np.full(len(scale), zero) if quant.channels else zero),
        ]
        grid = [
            graph.constant(np.float32(output.scale)),
            graph.constant(np.uint8(output.zero_point)),
        ]
        if layer.geometry is None:
            array = graph.constant(np.ascontiguousarray(integers.T))
            out = graph.call(GEMM, *inputs, array, *rest, shift, *grid)
        else:
            inputs += [graph.constant(integers), *rest, *grid, *([shift] if shift else [])]
            out = graph.call("QLinearConv", *inputs, **attributes_of(layer.geometry))
        return self._clipped(out, output.zero_point if layer.relu else 0, output.quant_max)

    def max_pool(self, x: str, **attributes: Any) -> str:
        if x not in self._unclipped:
            return super().max_pool(x, **attributes)
        # The order does not matter, and the runtime pools the output of a convolution faster.
        out, low, high = self._unclipped[x]
        return self._clipped(super().max_pool(out, **attributes), low, high)

    def _clipped(self, x: str, low: int, high: int) -> str:
        if low == 0 and high == 255:
            return x
        ends = (self.graph.constant(np.uint8(end)) for end in (low, high))
        out = self.graph.call("Clip", x, *ends)
        self._unclipped[out] = (x, low, high)
        return out
