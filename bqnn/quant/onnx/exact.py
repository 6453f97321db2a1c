"""The form `exact`: operators on integers, and float32 operators in the order of bqnn's int8.

A sum of products is an operator on integers (ConvInteger, MatMulInteger), so that it is exact in
any correct runtime. Float32 operators then round it in the order of `requantize`, so that even
ties round equally. What reads one integer and rounds once is a table of 256 entries.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bqnn.layers.linear_map import Geometry
from bqnn.quant.engines.contract import ActivationGrid
from bqnn.quant.engines.rounding import (
    Rounding,
    as_read_for_fused_sum,
    from_integers,
    in_float32,
    integer_bias,
    scales_of_onednn,
    summand_factor,
)
from bqnn.quant.fake_quant import FakeQuant
from bqnn.quant.onnx.graph import Graph
from bqnn.quant.onnx.pooling import Averages
from bqnn.quant.onnx.values import Value
from bqnn.quant.simulated import SimulatedAdd, SimulatedCat, SimulatedLayer


class ExactForm:
    """Writes the modules of a simulated network as operators on integers.

    Args:
        graph: The graph to write into.
        batch_size: The number of rows for which engines select their kernels.
    """

    def __init__(self, graph: Graph, batch_size: int = 256) -> None:
        self.graph = graph
        self.batch_size = batch_size

    def enter(self, x: str, quant: FakeQuant) -> str:
        """Round floats to a grid."""
        steps = self.graph.call("Mul", x, self.graph.constant((1 / quant.scale).numpy()))
        return self._integers(self.graph.call("Round", steps), quant)

    def leave(self, x: Value) -> str:
        """Convert integers to floats."""
        assert x.integers is not None
        return self._by(self._centered(x.name, x.integers), floats_of(x.integers.scale))

    def layer(self, x: Value, layer: SimulatedLayer) -> str:
        """Apply a linear layer or a convolution, with the weights of the held draw."""
        assert x.integers is not None
        _, bias = layer.fold()
        quant, output = layer.weight_grid, layer.output_quant
        sums, along = self._float_sums(x, layer), _along(layer)
        shape = self._shape(x, layer)
        rounding = layer.executor.rounding(layer.kernel(x.integers.zero_point), shape)
        if rounding.startswith("onednn"):
            floats = self._as_floats(sums, x.integers.scale, layer, rounding)
            steps = self._as_onednn(floats, output)
        else:
            product = quant.scale * x.integers.scale
            if bias is not None:
                sums = self._plus_bias(sums, bias, product, along, rounding)
            steps = self._by(sums, (product / output.scale).view(along))
            steps = self.graph.call("Round", steps)
        return self._integers(steps, output, relu=layer.relu)

    def add_within(self, x: Value, y: Value, layer: SimulatedLayer, module: SimulatedAdd) -> str:
        """Add activations to the output of a layer, as `sum_within_layer` does."""
        graph, grid, other = self.graph, x.integers, y.integers
        assert grid is not None
        assert other is not None
        output = ActivationGrid.of(module.output_quant)
        kernel = layer.kernel_of_sum(grid.zero_point, other.zero_point, output, module.relu)
        rounding = layer.executor.rounding(kernel, self._shape(x, layer))
        floats = self._as_floats(self._float_sums(x, layer), grid.scale, layer, rounding)
        scale = graph.constant(np.float64(in_float32(other.scale)))
        steps = graph.call("Mul", graph.cast(self._centered(y.name, other), np.float64), scale)
        total = graph.call("Add", steps, graph.cast(floats, np.float64))
        rounded = self._as_onednn(graph.cast(total, np.float32), module.output_quant)
        return self._integers(rounded, module.output_quant, relu=module.relu)

    def add(self, x: Value, y: Value, module: SimulatedAdd) -> str:
        """Add activations."""
        output, summands = module.output_quant, []
        for each in (x, y):
            grid = each.integers
            assert grid is not None
            if module.engine.fuses_sums:
                centered = torch.arange(256.0) - grid.zero_point
                table = as_read_for_fused_sum((centered, grid.scale, grid.zero_point))
                summands.append(self._looked_up(each.name, table))
            else:
                factor = summand_factor(grid.scale, float(output.scale))
                summands.append(self._by(self._centered(each.name, grid), floats_of(factor)))
        steps = self.graph.call("Add", *summands)
        if module.engine.fuses_sums:
            steps = self._by(steps, 1 / output.scale)
        return self._integers(self.graph.call("Round", steps), output, relu=module.relu)

    def cat(self, inputs: list[Value], module: SimulatedCat) -> str:
        """Concatenate activations, each requantized to one grid."""
        parts = []
        for x in inputs:
            assert x.integers is not None
            floats = from_integers(torch.arange(256.0) - x.integers.zero_point, x.integers.scale)
            parts.append(self._looked_up(x.name, module.output_quant.integers(floats)))
        return self.graph.call("Concat", *parts, axis=module.dim)

    def average(self, x: Value, averages: Averages, quant: FakeQuant) -> str:
        """Average windows of an image."""
        graph = self.graph
        assert x.integers is not None
        if averages.is_global:
            zero_point = graph.constant(np.int32(x.integers.zero_point))
            centered = graph.call("Sub", graph.cast(x.name, np.int32), zero_point)
            sums = graph.call(
                "ReduceSum", centered, graph.constant(np.array([2, 3], np.int64)), keepdims=1
            )
        else:
            rows = graph.call("Reshape", x.name, graph.constant(averages.flat_shape))
            windows = graph.constant(averages.windows.numpy().astype(np.uint8))
            zero_points = (self._zero_point(x.integers), graph.constant(np.uint8(0)))
            sums = graph.call("MatMulInteger", rows, windows, *zero_points)
        means = graph.cast(sums, np.float32)
        for divisor in averages.divisors:
            means = graph.call("Div", means, graph.constant(divisor.numpy()))
        means = graph.call("Reshape", means, graph.constant(averages.output_shape))
        floats = self._by(means, floats_of(x.integers.scale))
        return self.enter(floats, quant)

    def dropout(self, x: Value, kept: str) -> str:
        """Set dropped integers to the zero point."""
        assert x.integers is not None
        return self.graph.call("Where", kept, x.name, self._zero_point(x.integers))

    def relu(self, x: Value) -> str:
        """Clamp integers to the zero point and above."""
        assert x.integers is not None
        return self.graph.call("Clip", x.name, self._zero_point(x.integers))

    def max_pool(self, x: str, **attributes: Any) -> str:
        """Take the maximum of each window."""
        return self.graph.call("MaxPool", x, **attributes)

    def _centered(self, x: str, grid: ActivationGrid) -> str:
        """Return integers minus their zero point, in float32."""
        floats = self.graph.cast(x, np.float32)
        if grid.zero_point == 0:
            return floats
        return self.graph.call("Sub", floats, self.graph.constant(np.float32(grid.zero_point)))

    def _shape(self, x: Value, layer: SimulatedLayer) -> tuple[int, ...]:
        """Return the shape of the inputs by which an engine selects a kernel."""
        row = x.example.shape[-1:] if layer.geometry is None else x.example.shape[1:]
        return (self.batch_size, *row)

    def _float_sums(self, x: Value, layer: SimulatedLayer) -> str:
        """Return the sums of products of a layer in float32."""
        weight = layer.weight_steps(layer.fold()[0])
        return self.graph.cast(self._sums(x, weight, layer.geometry), np.float32)

    def _sums(self, x: Value, weight: Tensor, geometry: Geometry | None) -> str:
        """Sum products of integers; exact also where instructions for 8 bits would saturate."""
        assert x.integers is not None
        low = weight.clamp(-128, 127)  # affine weights can be further from their zero point
        parts = [low, weight - low] if not torch.equal(low, weight) else [weight]
        sums = [self._product(x.name, x.integers, part, geometry) for part in parts]
        return sums[0] if len(sums) == 1 else self.graph.call("Add", *sums)

    def _product(
        self, x: str, grid: ActivationGrid, weight: Tensor, geometry: Geometry | None
    ) -> str:
        graph = self.graph
        array, zero = integers_of_weight(weight, grid)
        zero_points = (self._zero_point(grid), graph.constant(zero))
        if geometry is None:
            return graph.call("MatMulInteger", x, graph.constant(array.T), *zero_points)
        return graph.call(
            "ConvInteger", x, graph.constant(array), *zero_points, **attributes_of(geometry)
        )

    def _plus_bias(
        self,
        sums: str,
        bias: Tensor,
        product: Tensor,
        along: tuple[int, ...],
        rounding: Rounding,
    ) -> str:
        """Compute sums + bias / product as `bqnn.quant.engines.rounding.plus_bias` does."""
        graph = self.graph
        if rounding in ("fbgemm_fused", "integer_bias"):
            steps = bias.double() * (1 / product).double()
            if rounding == "integer_bias":
                steps = integer_bias(bias, product)
            steps = steps.view(along)
            total = graph.call(
                "Add", graph.cast(sums, np.float64), graph.constant(steps.detach().numpy())
            )
            return graph.cast(total, np.float32)
        steps = bias / product if rounding == "fbgemm" else bias * (1 / product)
        return graph.call("Add", sums, graph.constant(steps.detach().view(along).numpy()))

    def _as_floats(self, sums: str, scale: float, layer: SimulatedLayer, rounding: Rounding) -> str:
        """Return the outputs of a layer before they are rounded, as `as_floats` does."""
        graph, weight, (_, bias) = self.graph, layer.weight_grid, layer.fold()
        along = _along(layer)
        s_x, s_w = scales_of_onednn(scale, weight.scale, rounding, is_conv=len(along) == 4)
        s_w = s_w.view(along)
        if rounding.endswith("product"):
            floats = self._by(sums, s_x * s_w)
        else:
            floats = self._by(self._by(sums, s_x), s_w)
        if bias is None:
            return floats
        return graph.call("Add", floats, graph.constant(bias.detach().view(along).numpy()))

    def _as_onednn(self, floats: str, output: FakeQuant) -> str:
        """Round as oneDNN does, and subtract the zero point."""
        graph = self.graph
        zero_point = graph.constant(np.float32(int(output.zero_point)))
        steps = graph.call("Add", self._by(floats, 1 / output.scale), zero_point)
        return graph.call("Sub", graph.call("Round", steps), zero_point)

    def _integers(self, steps: str, quant: FakeQuant, relu: bool = False) -> str:
        """Clamp rounded steps from the zero point, and convert them to integers."""
        graph, zero_point = self.graph, int(quant.zero_point)
        low = graph.constant(np.float32(0 if relu else -zero_point))
        high = graph.constant(np.float32(quant.quant_max - zero_point))
        clamped = graph.call("Clip", steps, low, high)
        if zero_point:
            clamped = graph.call("Add", clamped, graph.constant(np.float32(zero_point)))
        return graph.cast(clamped, np.uint8)

    def _by(self, x: str, factor: Tensor) -> str:
        return self.graph.call("Mul", x, self.graph.constant(factor.detach().numpy()))

    def _looked_up(self, x: str, table: Tensor) -> str:
        """Replace each integer by its entry in a table."""
        index = self.graph.cast(x, np.int32)
        return self.graph.call("Gather", self.graph.constant(table.numpy()), index, axis=0)

    def _zero_point(self, grid: ActivationGrid) -> str:
        return self.graph.constant(np.uint8(grid.zero_point))


def integers_of_weight(steps: Tensor, grid: ActivationGrid) -> tuple[np.ndarray, Any]:
    """Return weights as integers of a type whose products no instruction saturates.

    Args:
        steps: Steps of the weights from their zero point, -128 to 127, as floats.
        grid: The grid of the activations that they multiply.

    Returns:
        The integers, shaped like `steps`, and the integer of 0.
    """
    # CPUs without VNNI add pairs of products of an unsigned and a signed integer in 16 bits.
    # Runtimes multiply two unsigned integers in a wider type.
    is_wide = 2 * grid.quant_max * int(steps.abs().max()) > 32_767
    dtype, zero = (np.uint8, 128) if is_wide else (np.int8, 0)
    return (steps.detach() + zero).numpy().astype(dtype), dtype(zero)


def floats_of(scale: float) -> Tensor:
    """Return a scale in float32."""
    return torch.tensor(scale, dtype=torch.float32)


def attributes_of(geometry: Geometry) -> dict[str, object]:
    """Return the attributes of a convolution."""
    return {
        "strides": tuple(geometry.stride),
        "pads": (*geometry.padding, *geometry.padding),
        "dilations": tuple(geometry.dilation),
        "group": geometry.groups,
    }


def _along(layer: SimulatedLayer) -> tuple[int, ...]:
    """Return the shape of values that belong to the outputs [C] of a layer."""
    return (1, -1) if layer.geometry is None else (1, -1, 1, 1)
