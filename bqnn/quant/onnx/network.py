"""Write a simulated network into a graph, one draw after the other."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bqnn.layers.draws import Drawn
from bqnn.layers.dropout import MCDropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.markers import Cat, DropoutSite, Pool
from bqnn.layers.trace import function_of, trace
from bqnn.quant.engines.contract import ActivationGrid
from bqnn.quant.fake_quant import FakeQuant
from bqnn.quant.grids import ASKING, OnGrid, grid_of, keeps_grid, plain
from bqnn.quant.onnx.floats import POOLS, SOFTMAXES, write_average, write_module
from bqnn.quant.onnx.graph import Graph
from bqnn.quant.onnx.moves import Move, write_move
from bqnn.quant.onnx.pooling import Averages
from bqnn.quant.onnx.values import Value, row_of
from bqnn.quant.postponed import Activation, Postponed, in_one_kernel, rounded
from bqnn.quant.simulated import (
    OutputOnGrid,
    SimulatedAdd,
    SimulatedAvgPool,
    SimulatedCat,
    SimulatedEnter,
    SimulatedLayer,
    SimulatedLeave,
    SimulatedPool,
)
from bqnn.quant.traced import Traced

UNCHANGED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, DropoutSite)
RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
FUNCTIONS_CAT = (torch.cat, torch.concat, torch.concatenate)


class Form(Protocol):
    """How the modules of a simulated network become operators."""

    def enter(self, x: str, quant: FakeQuant) -> str: ...
    def leave(self, x: Value) -> str: ...
    def layer(self, x: Value, layer: SimulatedLayer) -> str: ...
    def add(self, x: Value, y: Value, module: SimulatedAdd) -> str: ...
    def add_within(
        self, x: Value, y: Value, layer: SimulatedLayer, module: SimulatedAdd
    ) -> str: ...
    def cat(self, inputs: list[Value], module: SimulatedCat) -> str: ...
    def average(self, x: Value, averages: Averages, quant: FakeQuant) -> str: ...
    def dropout(self, x: Value, kept: str) -> str: ...
    def relu(self, x: Value) -> str: ...
    def max_pool(self, x: str, **attributes: Any) -> str: ...


class NetworkWriter:
    """Writes the `forward` of a simulated network into a graph, for the draw that is held.

    Args:
        graph: The graph to write into.
        form: The form of the modules in integers.
        traces: The graph of `forward` of networks, from `traced`; others are added.

    Attributes:
        float_parts: The names of what computes in float, whose results depend on the runtime.
        rounded: The outputs of the modules that round, by the name of the module.
    """

    def __init__(
        self, graph: Graph, form: Form, traces: dict[nn.Module, fx.Graph] | None = None
    ) -> None:
        self.graph = graph
        self.form = form
        self.float_parts: set[str] = set()
        self.rounded: dict[str, Value] = {}
        self._traces = {} if traces is None else traces
        self._measured: dict[tuple[str, torch.Size], Averages] = {}

    @torch.no_grad()
    def write(self, net: nn.Module, x: Value) -> Value:
        """Write the network of the held draw, and return its output.

        Args:
            net: The simulated network, in evaluation mode and on the CPU.
            x: Its inputs.

        Raises:
            TypeError: The network has an operation that cannot be exported. The message names it.
        """
        if isinstance(net, Ensemble):
            place = net.held()
            net = net.members[place] if net.members else net.current
        values: dict[fx.Node, Any] = {}
        if net not in self._traces:
            self._traces[net] = traced(net)
        for node in self._traces[net].nodes:
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            if node.op == "placeholder":
                values[node] = args[0] if args else x
            elif node.op == "output":
                if not isinstance(args[0], Value):
                    raise TypeError("export: the network returns more than one tensor")
                return args[0]
            elif node.op == "get_attr":
                raise TypeError(
                    f"export: the network reads its attribute {node.target} in forward, which "
                    "cannot be exported"
                )
            elif node.op == "call_module":
                name = str(node.target)
                inputs = [*args, *kwargs.values()]
                values[node] = self._module(name, net.get_submodule(name), inputs)
            else:
                values[node] = self._function(function_of(node), node, args, kwargs)
        raise AssertionError("a graph ends with its output")

    def _module(self, name: str, module: nn.Module, args: list[Any]) -> Value:
        x = args[0]
        if isinstance(module, SimulatedLeave):
            floats = module(x.example)
            return Value(self.form.leave(x), floats, None, row_of(floats, x.integers.scale))
        if isinstance(module, SimulatedLayer) and module.is_postponed:
            return replace(x, postponed=Postponed(module, x.example))
        if isinstance(module, OutputOnGrid):
            written = self._rounding(name, module, args)
            quant = ActivationGrid.of(module.output_quant)
            self.rounded[name] = Value(written, module(*map(_activation, args)), quant)
            return self.rounded[name]
        if isinstance(module, MCDropout):
            return self._dropout(x, module)
        if isinstance(module, UNCHANGED) and not isinstance(module, Drawn):
            return x
        if type(module) is nn.ReLU:
            return self._relu(x)
        if type(module) is nn.MaxPool2d:
            return self._max_pool(x, module)
        if type(module) in (nn.Flatten, nn.Unflatten):
            moved = write_move(self.graph, x, module, name)
            assert isinstance(moved, Value)
            return moved
        return self._float_module(name, module, args)

    def _rounding(self, name: str, module: OutputOnGrid, args: list[Value]) -> str:
        """Write a module that rounds its outputs to a grid."""
        x, form = args[0], self.form
        if isinstance(module, SimulatedEnter):
            return form.enter(x.name, module.output_quant)
        if isinstance(module, SimulatedLayer):
            return form.layer(x, module)
        if isinstance(module, SimulatedAdd):
            return self._add(x, args[1], module)
        if isinstance(module, SimulatedCat):
            return form.cat(args, module)
        assert isinstance(module, SimulatedPool | SimulatedAvgPool)
        pool = module.pool if isinstance(module, SimulatedAvgPool) else Pool()
        return form.average(x, self._averages(pool, x, name), module.output_quant)

    def _add(self, x: Value, y: Value, module: SimulatedAdd) -> str:
        if in_one_kernel(_activation(x), _activation(y)) is None:
            return self.form.add(self._rounded_layer(x), self._rounded_layer(y), module)
        first, other = (y, x) if x.postponed is None else (x, y)
        assert first.postponed is not None
        assert isinstance(first.postponed.layer, SimulatedLayer)
        return self.form.add_within(first, other, first.postponed.layer, module)

    def _rounded_layer(self, x: Value) -> Value:
        """Return a value, for which a postponed layer is written now."""
        if x.postponed is None:
            return x
        layer = x.postponed.layer
        assert isinstance(layer, SimulatedLayer)
        quant = ActivationGrid.of(layer.output_quant)
        return Value(self.form.layer(x, layer), rounded(x.postponed), quant)

    def _averages(self, pool: nn.Module, x: Value, name: str) -> Averages:
        key = (name, x.example.shape[2:])
        if key not in self._measured:
            self._measured[key] = Averages.of(pool, plain(x.example), name)
        return self._measured[key]

    def _dropout(self, x: Value, module: MCDropout) -> Value:
        if module.rate == 0:
            return x
        example, factor = plain(x.example), 1 / (1 - module.rate)
        name, kept = self.kept(module, example)
        if x.integers is None:
            scaled = self.graph.cast(name, np.float32)
            by = self.graph.call("Mul", scaled, self.graph.constant(np.float32(factor)))
            out = self.graph.call("Mul", x.name, by)
            return Value(out, example * kept.float().mul_(factor), None, x.steps)
        grid = grid_of(x.example)
        assert grid is not None
        dropped = OnGrid.of(example * kept * factor, grid._replace(scale=grid.scale * factor))
        integers = x.integers._replace(scale=x.integers.scale * factor)
        return Value(self.form.dropout(x, name), dropped, integers)

    def kept(self, module: MCDropout, example: Tensor) -> tuple[str, Tensor]:
        """Return what MC dropout keeps: its name in the graph, and booleans for the example."""
        kept = module.kept(example)[:1]
        return self.graph.constant(kept.numpy()), kept

    def _relu(self, x: Value) -> Value:
        if x.integers is None:
            return x.moved(self.graph.call("Relu", x.name), x.example.relu(), x.steps)
        return x.moved(self.form.relu(x), x.example.relu())

    def _max_pool(self, x: Value, pool: nn.MaxPool2d) -> Value:
        out = pool(x.example)
        kernel, strides, dilations = map(_pair, (pool.kernel_size, pool.stride, pool.dilation))
        before = _pair(pool.padding)
        # Runtimes count windows that reach over the border in other ways than torch.
        sizes = zip(
            before, x.example.shape[-2:], out.shape[-2:], kernel, strides, dilations, strict=True
        )
        after = tuple(
            max(0, (n - 1) * s + d * (k - 1) + 1 - size - pad) for pad, size, n, k, s, d in sizes
        )
        name = self.form.max_pool(
            x.name,
            kernel_shape=kernel,
            strides=strides,
            pads=before + after,
            dilations=dilations,
        )
        return x.moved(name, out, None if x.steps is None else row_of(out, x.steps.max().item()))

    def _float_module(self, name: str, module: nn.Module, args: list[Any]) -> Value:
        x = args[0]
        if x.integers is None:
            if isinstance(module, Cat):
                return self._cat(args, module.dim)
            return self._computed(name, x, module, write_module(self.graph, x, module, name))
        raise TypeError(f"export: {name}, a {type(module).__name__}, has no form in integers")

    def _computed(self, name: str, x: Value, module: Any, written: str) -> Value:
        """Return the output of an operation that computes in float."""
        self.float_parts.add(name)
        out = module(x.example)
        step = None if x.steps is None else row_of(out, x.steps.max().item())
        return Value(written, out, None, step)

    def _cat(self, inputs: Any, dim: int) -> Value:
        examples = [x.example for x in inputs]
        axis = dim % examples[0].dim()
        name = self.graph.call("Concat", *[x.name for x in inputs], axis=axis)
        steps = None
        if axis > 0 and all(x.steps is not None for x in inputs):
            steps = torch.cat([x.steps for x in inputs], axis - 1)
        return Value(name, torch.cat(examples, axis), None, steps)

    def _function(self, function: Any, node: fx.Node, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Write the call of a function, or compute it if it is about sizes."""
        x = args[0] if args else None
        if not _holds_value([args, kwargs]):
            return function(*args, **kwargs)
        name = getattr(node.target, "__name__", str(node.target))
        if function is getattr or function in ASKING:
            return function(*[_example(a) for a in args], **kwargs)
        if not isinstance(x, Value):
            if isinstance(x, list | tuple) and all(isinstance(each, Value) for each in x):
                if function in FUNCTIONS_CAT and all(each.integers is None for each in x):
                    return self._cat(x, kwargs.get("dim", args[1] if len(args) > 1 else 0))
                if name == "getitem":
                    return x[args[1]]
        elif function in RELUS:
            return self._relu(x)
        elif function in SOFTMAXES and x.integers is None:
            operator, axis = SOFTMAXES[function](*args, **kwargs)
            called = lambda t: function(t, *args[1:], **kwargs)  # noqa: E731
            return self._computed(name, x, called, self.graph.call(operator, x.name, axis=axis))
        elif function in POOLS and x.integers is None and x.example.dim() == 4:
            pool = lambda t: function(t, *args[1:], **kwargs)  # noqa: E731
            averages = Averages.of(pool, x.example, name)
            return self._computed(name, x, pool, write_average(self.graph, x.name, averages))
        elif "max_pool2d" in name:
            return self._max_pool(x, nn.MaxPool2d(*args[1:], **kwargs))
        elif keeps_grid(function, args, kwargs):
            rest = [_example(each) for each in args[1:]]
            move: Move = lambda t: function(t, *rest, **kwargs)  # noqa: E731
            return write_move(self.graph, x, move, name)
        raise TypeError(
            f"export: the function {name} cannot be exported; a file can have what moves "
            "elements, relu, max_pool2d and, outside of the integers, averages, cat, softmax and "
            "log_softmax"
        )


def traced(net: nn.Module) -> fx.Graph:
    """Trace the `forward` of a simulated network. Meanwhile, no other thread may call a module."""
    if isinstance(net, Traced):
        return net.graph
    return trace(net, leaves=[m for m in net.modules() if isinstance(m, OutputOnGrid)])


def _holds_value(parts: Any) -> bool:
    if isinstance(parts, Mapping):
        parts = list(parts.values())
    if isinstance(parts, list | tuple):
        return any(map(_holds_value, parts))
    return isinstance(parts, Value)


def _activation(value: Value) -> Activation:
    return value.example if value.postponed is None else value.postponed


def _example(value: Any) -> Any:
    return value.example if isinstance(value, Value) else value


def _pair(sizes: Any) -> tuple[int, int]:
    height, width = sizes if isinstance(sizes, tuple | list) else (sizes, sizes)
    return height, width
