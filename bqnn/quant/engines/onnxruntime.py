"""The engine onnxruntime: the whole network as one ONNX graph, run by ONNX Runtime."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from bqnn.layers.draws import Drawn, DrawnWeights, held_draw
from bqnn.layers.dropout import MCDropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.finite import refuse_non_finite
from bqnn.layers.markers import Enter, Quantized
from bqnn.quant.engines.contract import Layer, NetworkEngine, WholeNetwork, region_inputs
from bqnn.quant.engines.rounding import Rounding
from bqnn.quant.grids import UNTRACED, plain
from bqnn.quant.onnx.graph import Graph, Port
from bqnn.quant.onnx.network import NetworkWriter, traced
from bqnn.quant.onnx.qlinear import QLinearForm
from bqnn.quant.onnx.session import missing_packages, start_session
from bqnn.quant.onnx.values import Value

NUM_EXAMPLES = 5  # rows with which a network is walked


def make(name: str) -> NetworkEngine:
    """Return the engine."""
    return OnnxRuntime()


class OnnxRuntime(NetworkEngine):
    """ONNX Runtime on the CPU, with sums of products in QLinearConv and QGemm."""

    name = "onnxruntime"

    def missing(self) -> str | None:
        return missing_packages()

    def rounding(self, layer: Layer, inputs: Sequence[int]) -> Rounding:
        return "integer_bias"

    def can_be_wrong(self, layer: Layer, weight_bits: int, activation_bits: int) -> bool:
        return False  # weights become unsigned where 16 bits do not hold two products

    def network(self, simulated: nn.Module) -> WholeNetwork:
        return OnnxNetwork(simulated)


class OnnxNetwork(Quantized, Drawn, WholeNetwork):
    """A simulated network that ONNX Runtime executes in integers.

    Each draw of random weights is a graph of its own. A graph takes the masks of MC dropout as
    inputs, so that each row has its own mask.

    Args:
        simulated: The network, in evaluation mode and on the CPU.
    """

    def __init__(self, simulated: nn.Module) -> None:
        super().__init__()
        self.simulated = simulated
        self._turns = itertools.count()
        self._start()

    def _start(self) -> None:
        net = self.simulated
        parts = [*(net.members or [net.current])] if isinstance(net, Ensemble) else [net]
        self._traces = {part: traced(part) for part in parts}  # tracing is not safe in threads
        self._graphs: dict[Any, OneDraw] = {}  # of networks without random weights
        self._entry = next(name for name, m in parts[0].named_modules() if isinstance(m, Enter))
        self._is_random = any(isinstance(module, DrawnWeights) for module in net.modules())

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what can be made again."""
        left_out = ("_graphs", "_traces", "_entry", "_is_random")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def make_draw(self, index: int) -> dict[Any, "OneDraw"]:
        return {}  # `forward` writes the graph, once all layers have their draw

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise TypeError(UNTRACED)
        x = region_inputs(x, self._entry)
        refuse_non_finite(x)
        return self._with_graph(x)[""]

    def integers(self, x: Tensor) -> dict[str, Tensor]:
        found = self._with_graph(x, all_outputs=True)
        return {name: values for name, values in found.items() if name}

    def _with_graph(self, x: Tensor, all_outputs: bool = False) -> dict[str, Tensor]:
        held = self.held()
        if held is not None:
            return self._graph(held, x, all_outputs).run(x)
        net = self.simulated
        members = len(net) if isinstance(net, Ensemble) else 1
        with held_draw(self, next(self._turns) % max(members, 1)):
            return self._graph(self.held(), x, all_outputs).run(x)

    def _graph(self, held: dict[Any, "OneDraw"], x: Tensor, all_outputs: bool) -> "OneDraw":
        net = self.simulated
        kept = held if self._is_random else self._graphs
        if all_outputs:
            return OneDraw(net, x, self._traces, all_outputs=True)
        member = net.held() if isinstance(net, Ensemble) else 0
        key = (member, x.shape[1:], torch.get_num_threads())
        if key not in kept:
            kept[key] = OneDraw(net, x, self._traces, all_outputs=False)
        return kept[key]


class OneDraw:
    """The held draw of a network as a graph in ONNX Runtime.

    Args:
        net: The simulated network.
        x: Inputs [N, ...], which show the shape of a row.
        traces: The graphs of `forward` of the network, or of the members of an ensemble.
        all_outputs: Whether the graph returns the integers of all modules that round.
    """

    def __init__(
        self,
        net: nn.Module,
        x: Tensor,
        traces: dict[nn.Module, fx.Graph],
        *,
        all_outputs: bool,
    ) -> None:
        graph = Graph()
        writer = RowMasks(graph, QLinearForm(graph), traces)
        output = writer.write(net, Value("inputs", _example(x)))
        float32, uint8 = np.dtype(np.float32), np.dtype(np.uint8)
        prefix = ""
        if isinstance(net, Ensemble):
            prefix = f"members.{net.held()}." if net.members else "current."
        outputs = {output.name: Port("output", float32, _free(output.example))}
        self._names = [""]
        for name, value in writer.rounded.items() if all_outputs else ():
            if value.name not in outputs:
                outputs[value.name] = Port(f"of {name}", uint8, _free(value.example))
                self._names.append(prefix + name)
        ports = [Port("inputs", float32, _free(x)), *(port for port, *_ in writer.masks)]
        self._masks = writer.masks
        proto = graph.to_onnx(ports, outputs, {}, check=False)
        self._session = start_session(proto.SerializeToString(), torch.get_num_threads())

    def run(self, x: Tensor) -> dict[str, Tensor]:
        """Run the graph on inputs [N, ...]; new masks are drawn from the held draw."""
        fed = {"inputs": x.detach().contiguous().numpy()}
        for port, dropout, shape in self._masks:
            kept = dropout.kept(torch.empty(len(x), *shape))
            fed[port.name] = kept.numpy()
        outputs = self._session.run(None, fed)
        return {
            name: torch.from_numpy(values)
            for name, values in zip(self._names, outputs, strict=True)
        }


class RowMasks(NetworkWriter):
    """Writes masks of MC dropout as inputs of the graph.

    Attributes:
        masks: The input, the module, and the shape of a row of its inputs, for each mask.
    """

    def __init__(self, graph: Graph, form: QLinearForm, traces: dict[nn.Module, fx.Graph]) -> None:
        super().__init__(graph, form, traces)
        self.masks: list[tuple[Port, MCDropout, torch.Size]] = []

    def kept(self, module: MCDropout, example: Tensor) -> tuple[str, Tensor]:
        all_kept = module.kept_like(example)
        name = f"mask_{len(self.masks)}"
        shape = (f"N_{name}", *all_kept.shape[1:])
        self.masks.append((Port(name, np.dtype(bool), shape), module, example.shape[1:]))
        return name, all_kept


def _example(x: Tensor) -> Tensor:
    """Return a few rows like those of `x`; their number must not matter to the network."""
    if len(x) == 0:
        return torch.zeros(NUM_EXAMPLES, *x.shape[1:])
    return plain(x)[torch.arange(NUM_EXAMPLES) % len(x)].contiguous()


def _free(x: Tensor) -> tuple[int | str, ...]:
    return ("N", *x.shape[1:])
