"""Traced: a network as a graph of the modules that it calls."""

from collections.abc import Collection
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import reduce_graph_module

from bqnn.layers.trace import caller_of
from bqnn.quant.grids import kept_in_float


class Traced(fx.GraphModule):
    """A network as a graph of calls. Its modules keep the names and the order of the network's.

    It shares its modules with the network, except for those that only contain others.

    Args:
        net: The network.
        graph: What its `forward` calls, see `bqnn.layers.trace`.
        kept: Modules that stay in float.
    """

    def __init__(self, net: nn.Module, graph: fx.Graph, kept: Collection[nn.Module] = ()) -> None:
        constants = {n.target: n.meta["constant"] for n in graph.nodes if "constant" in n.meta}
        vars(net).update(constants)  # where the base class looks for them
        try:
            super().__init__(net, graph, class_name=type(net).__name__)
        finally:
            for name in constants:
                del vars(net)[name]
        _order_like(self, net)
        self.meta["given"] = {name for name, _ in self.named_modules(remove_duplicate=False)}
        self.meta["kept"] = {name for _, name, module in self.named_calls() if module in kept}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Traced":
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, Traced)
        type(copied).__name__ = type(self).__name__
        _order_like(copied, self)
        return copied

    def __copy__(self) -> "Traced":
        return _restored(vars(self), self.graph, type(self).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        _, (state, code) = super().__reduce__()
        return _loaded, (state, code, type(self).__name__)

    @property
    def kept(self) -> set[str]:
        """The names of the modules that stay in float."""
        names: set[str] = self.meta["kept"]
        return names

    def remedy(self, node: fx.Node) -> str:
        """Return how to keep a call in float: by the name of its module, or of its caller."""
        if node.op != "call_module":
            return kept_in_float(caller_of(node))
        name = str(node.target)
        is_given = name in self.meta["given"]  # and not made for the call of a function
        return kept_in_float(name if is_given else name.rpartition(".")[0])

    def named_calls(self) -> list[tuple[fx.Node, str, nn.Module]]:
        """Return the calls of modules in their order: node, name and module."""
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        return [(node, str(node.target), self.get_submodule(str(node.target))) for node in calls]

    def insert_call(
        self, module: nn.Module, inputs: tuple[fx.Node, ...], caller: str = ""
    ) -> fx.Node:
        """Add a module, and a call of it where the graph inserts.

        Args:
            module: The module. Its type names it.
            inputs: The inputs of the call.
            caller: The name of the module in which the new one gets its place.
        """
        kind = type(module).__name__.lower()
        names = {name for name, _ in self.named_modules(remove_duplicate=False)}
        base = f"{caller}.{kind}".lstrip(".")
        name, count = base, 1
        while name in names:
            name, count = f"{base}_{count}", count + 1
        self.add_submodule(name, module.train(self.training))
        return self.graph.call_module(name, inputs)


def replace_call(
    net: Traced, node: fx.Node, module: nn.Module, inputs: Any, caller: str
) -> fx.Node:
    """Replace a call by the call of a new module, and return it."""
    with net.graph.inserting_before(node):
        made = net.insert_call(module, tuple(inputs), caller)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    net.graph.erase_node(node)
    return made


def _loaded(state: dict[str, Any], code: str, name: str) -> Traced:
    """Restore a pickled network."""
    graph: Any = reduce_graph_module(dict(state), code).graph
    return _restored(state, graph, name)


def _restored(state: dict[str, Any], graph: fx.Graph, name: str) -> Traced:
    """Make a network from the attributes of another one, and a graph."""
    like = nn.Module()
    vars(like).update(state)
    net = Traced(like, graph)
    type(net).__name__ = name
    net.meta = dict(state["meta"])
    return net


def _order_like(net: nn.Module, like: nn.Module) -> None:
    """Give modules that only contain others the mode, and the order of children, of a network.

    Equal noise then gives equal draws, because draws follow the order of the modules.
    """
    net.training = like.training
    children = net._modules
    ordered = {name: children[name] for name in like._modules if name in children}
    net._modules = {**ordered, **children}
    for name, child in ordered.items():
        other = like._modules[name]
        if child is not None and other is not None and child is not other:
            _order_like(child, other)
