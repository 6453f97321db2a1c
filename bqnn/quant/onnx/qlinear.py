"""The form of the engine onnxruntime: QLinearConv and QGemm, with biases in int32."""

import numpy as np
import torch

from bqnn.quant.engines.contract import ActivationGrid
from bqnn.quant.engines.rounding import integer_bias
from bqnn.quant.onnx.exact import ExactForm, attributes_of, integers_of_weight
from bqnn.quant.onnx.values import Value
from bqnn.quant.simulated import SimulatedLayer

GEMM = "com.microsoft.QGemm"  # QLinearMatMul has no bias


class QLinearForm(ExactForm):
    """Writes layers as operators of ONNX Runtime that sum and requantize in one step.

    The sums, with a bias in int32, are multiplied by s_x s_w / s_y and rounded. All other modules
    are written as in `ExactForm`.
    """

    def layer(self, x: Value, layer: SimulatedLayer) -> str:
        if layer.geometry is None and x.example.dim() != 2:
            return super().layer(x, layer)
        assert x.integers is not None
        graph, output = self.graph, ActivationGrid.of(layer.output_quant)
        factor, bias = layer.fold()
        quant = layer.weight_grid
        weight = layer.rounded_weight(factor)
        steps = (weight / quant.along(weight, quant.scale)).round()
        integers, zero = integers_of_weight(steps, x.integers)
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
        low = output.zero_point if layer.relu else 0
        if low > 0 or output.quant_max < 255:
            out = graph.call(
                "Clip", out, *(graph.constant(np.uint8(e)) for e in (low, output.quant_max))
            )
        return out
