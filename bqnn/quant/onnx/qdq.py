"""The form `qdq`: float32 operators between QuantizeLinear and DequantizeLinear.

Tools for hardware read it and replace the operators between by integer ones of their own. Its
roundings are those of the runtime, so its integers differ from bqnn's int8 now and then.
"""

from typing import Any

import numpy as np
from torch import Tensor

from bqnn.quant.engines.contract import ActivationGrid
from bqnn.quant.fake_quant import FakeQuant
from bqnn.quant.onnx.exact import attributes_of
from bqnn.quant.onnx.floats import write_average
from bqnn.quant.onnx.graph import Graph
from bqnn.quant.onnx.pooling import Averages
from bqnn.quant.onnx.values import Value
from bqnn.quant.simulated import SimulatedAdd, SimulatedCat, SimulatedLayer


class QdqForm:
    """Writes the modules of a simulated network as float operators on dequantized values.

    Args:
        graph: The graph to write into.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def enter(self, x: str, quant: FakeQuant) -> str:
        """Round floats to a grid."""
        grid = ActivationGrid.of(quant)
        integers = self.graph.call("QuantizeLinear", x, *self._grid(grid))
        if grid.quant_max == 255:
            return integers
        ends = (self.graph.constant(np.uint8(end)) for end in (0, grid.quant_max))
        return self.graph.call("Clip", integers, *ends)

    def leave(self, x: Value) -> str:
        """Convert integers to floats."""
        assert x.integers is not None
        return self.graph.call("DequantizeLinear", x.name, *self._grid(x.integers))

    def layer(self, x: Value, layer: SimulatedLayer) -> str:
        """Apply a linear layer or a convolution, with the weights of the held draw."""
        out = self._floats(x, layer)
        out = self.graph.call("Relu", out) if layer.relu else out
        return self.enter(out, layer.output_quant)

    def _floats(self, x: Value, layer: SimulatedLayer) -> str:
        """Apply a layer, and return floats that are not rounded."""
        graph = self.graph
        assert x.integers is not None
        factor, bias = layer.fold()
        quant = layer.weight_grid
        inputs = [self.leave(x), self._weight(layer.rounded_weight(factor), quant)]
        if bias is not None:
            inputs.append(graph.constant(bias.detach().numpy()))
        if layer.geometry is not None:
            return graph.call("Conv", *inputs, **attributes_of(layer.geometry))
        if x.example.dim() == 2:
            return graph.call("Gemm", *inputs, transB=1)
        out = graph.call("MatMul", inputs[0], graph.call("Transpose", inputs[1], perm=(1, 0)))
        return out if bias is None else graph.call("Add", out, inputs[2])

    def add(self, x: Value, y: Value, module: SimulatedAdd) -> str:
        """Add activations."""
        return self._sum(self.leave(x), y, module)

    def add_within(self, x: Value, y: Value, layer: SimulatedLayer, module: SimulatedAdd) -> str:
        """Add activations to the output of a layer, which is not rounded."""
        return self._sum(self._floats(x, layer), y, module)

    def _sum(self, floats: str, y: Value, module: SimulatedAdd) -> str:
        total = self.graph.call("Add", floats, self.leave(y))
        total = self.graph.call("Relu", total) if module.relu else total
        return self.enter(total, module.output_quant)

    def cat(self, inputs: list[Value], module: SimulatedCat) -> str:
        """Concatenate activations."""
        whole = self.graph.call("Concat", *map(self.leave, inputs), axis=module.dim)
        return self.enter(whole, module.output_quant)

    def average(self, x: Value, averages: Averages, quant: FakeQuant) -> str:
        """Average windows of an image."""
        return self.enter(write_average(self.graph, self.leave(x), averages), quant)

    def dropout(self, x: Value, kept: str) -> str:
        """Set dropped integers to the zero point."""
        assert x.integers is not None
        zero_point = self.graph.constant(np.uint8(x.integers.zero_point))
        return self.graph.call("Where", kept, x.name, zero_point)

    def relu(self, x: Value) -> str:
        """Clamp integers to the zero point and above."""
        assert x.integers is not None
        zero_point = self.graph.constant(np.uint8(x.integers.zero_point))
        return self.graph.call("Clip", x.name, zero_point)

    def max_pool(self, x: str, **attributes: Any) -> str:
        """Take the maximum of each window."""
        return self.graph.call("MaxPool", x, **attributes)

    def _grid(self, grid: ActivationGrid) -> tuple[str, str]:
        scale = self.graph.constant(np.float32(grid.scale))
        return scale, self.graph.constant(np.uint8(grid.zero_point))

    def _weight(self, weight: Tensor, quant: FakeQuant) -> str:
        integers = quant.integers(weight)
        scale, zero_point = quant.scale, quant.zero_point.to(integers.dtype)
        if quant.channels is None:
            scale, zero_point = scale[0], zero_point[0]
        arrays = (each.numpy() for each in (integers, scale, zero_point))
        return self.graph.call("DequantizeLinear", *map(self.graph.constant, arrays), axis=0)
