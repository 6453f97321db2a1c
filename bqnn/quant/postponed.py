"""Layers that run within the residual sum that reads their output.

Some engines compute relu(layer(x) + y) in one kernel, which does not round the output of the layer
before the sum. A layer that `layers_before_sums` finds then returns a `Postponed` call, and the
sum runs it, in the simulation as in int8.
"""

from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor, fx, nn

from bqnn.layers.linear_map import Geometry
from bqnn.layers.markers import Add, DropoutSite
from bqnn.quant.engines.contract import output_shape
from bqnn.quant.fuse import Fused
from bqnn.quant.grids import refusal
from bqnn.quant.in_place import changes
from bqnn.quant.region import traced


class Summed(Protocol):
    """A layer whose call can be postponed to a sum.

    Attributes:
        path: The name of the layer in the network.
        geometry: The geometry of a convolution; None for a linear layer.
        weight_shape: The shape of the weights.
    """

    path: str
    geometry: Geometry | None

    @property
    def weight_shape(self) -> tuple[int, ...]: ...

    def rounded_output(self, x: Tensor) -> Tensor:
        """Compute the outputs, rounded to the grid of the layer."""
        ...


@dataclass(frozen=True, eq=False)
class Postponed:
    """The call of a layer that the residual sum after it runs.

    Args:
        layer: The layer.
        x: The inputs of the call.
    """

    layer: Summed
    x: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the outputs."""
        return output_shape(self.x.shape, self.layer.weight_shape, self.layer.geometry)

    def clone(self) -> Self:
        """Return the call on a copy of its inputs."""
        return type(self)(self.layer, self.x.clone())

    def on(self, x: Tensor) -> Self:
        """Return the call on other inputs."""
        return type(self)(self.layer, x)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = next(each for each in (*args, *(kwargs or {}).values()) if isinstance(each, cls))
        raise TypeError(refusal(getattr(func, "__name__", repr(func)), found.layer.path))


Activation = Tensor | Postponed


def in_one_kernel(x: Activation, y: Activation) -> tuple[Postponed, Tensor] | None:
    """Return the postponed call and the other summand of a sum, if one kernel can run both.

    A kernel does not broadcast.

    Args:
        x: The first summand.
        y: The second summand.
    """
    first, other = (x, y) if isinstance(x, Postponed) else (y, x)
    if not isinstance(first, Postponed) or isinstance(other, Postponed):
        return None
    return (first, other) if first.shape == other.shape else None


def rounded(x: Activation) -> Tensor:
    """Return an activation, for which a postponed layer runs now."""
    if isinstance(x, Postponed):
        return x.layer.rounded_output(x.x)
    return x


def layers_before_sums(net: nn.Module) -> set[str]:
    """Return the names of the layers whose outputs only a residual sum reads, one for each sum.

    A network whose `forward` cannot be traced has none.

    Args:
        net: A fused network.
    """
    graphs = [traced(net, training=training) for training in (False, True)]
    found = [set() if graph is None else _before_sums(net, graph) for graph in graphs]
    layers = found[0] & found[1]
    return {name for name, module in net.named_modules() if module in layers}


def _before_sums(net: nn.Module, graph: fx.Graph) -> set[nn.Module]:
    place = {node: index for index, node in enumerate(graph.nodes)}
    changing = [place[node] for node in graph.nodes if changes(net, node)]
    calls = [node for node in graph.nodes if node.op == "call_module"]
    modules = {node: net.get_submodule(str(node.target)) for node in calls}
    called = list(modules.values())
    found: set[nn.Module] = set()
    for node in calls:
        if not isinstance(modules[node], Add) or len(node.all_input_nodes) < 2:
            continue
        for argument in node.args:
            source = _before_identities(argument, modules)
            layer = modules.get(source) if source is not None else None
            if isinstance(layer, Fused) and not layer.relu and called.count(layer) == 1:
                assert source is not None
                between = range(place[source], place[node])
                if not any(index in between for index in changing):
                    found.add(layer)
                    break
    return found


def _before_identities(node: Any, modules: dict[fx.Node, nn.Module]) -> fx.Node | None:
    """Return the call whose output a node passes on to one reader; None if it has more readers."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if type(modules.get(node)) not in (nn.Identity, DropoutSite):
            return node
        node = node.args[0]
    return None
