"""Check that the integer region of a network, from Enter to Leave, can run in int8."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from bqnn.layers.dropout import MCDropout
from bqnn.layers.markers import Add, AvgPool, Cat, Enter, Leave, Pool
from bqnn.layers.swap import type_name
from bqnn.layers.trace import caller_of, function_of, trace
from bqnn.quant.fuse import ACTIVATIONS, Fused
from bqnn.quant.grids import ASKING, keeps_grid, refusal
from bqnn.quant.traced import Traced
from bqnn.text import type_of, with_article

# Modules that keep the grid of their input. (fuse() has removed an nn.ReLU after a layer.)
KEEPING = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.Flatten,
    nn.Identity,
    nn.MaxPool2d,
    nn.ReLU,
    nn.Unflatten,
    MCDropout,
)
SUPPORTED = "use ReLU, ReLU6 directly after a layer, max or average pools, sums and concatenations"
COMPUTING = (Fused, Add, Pool, AvgPool, Cat)
MARKED = (*COMPUTING, Enter, Leave, MCDropout)


def check_region(net: nn.Module) -> None:
    """Check that int8 can execute every operation between Enter and Leave.

    The check traces `forward` symbolically, without inputs. Activations on a grid may pass layers,
    markers, and operations that move elements or select a maximum. If `forward` cannot be traced,
    because its control flow depends on the inputs, `OnGrid` checks the operations at run time.

    Args:
        net: A fused network.

    Raises:
        ValueError: The network has no Enter or no Leave.
        TypeError: An operation cannot run in int8. The message names it and its module.
    """
    for kind in (Enter, Leave):
        if not any(isinstance(module, kind) for module in net.modules()):
            raise ValueError(
                f"prepare: the network has no {kind.__name__}, which marks where integers begin or "
                "end; put an Enter before its first layer and a Leave after its last "
                "(bqnn.layers.markers)"
            )
    for name, module in net.named_modules():
        _refuse_subclass(name, module)
    graph = traced(net)
    if graph is not None:
        with torch.no_grad():
            modules = dict(net.named_modules(remove_duplicate=False))
            _follow(graph, modules, net if isinstance(net, Traced) else None)


def traced(net: nn.Module, *, training: bool = False) -> fx.Graph | None:
    """Trace the `forward` of a fused network; None if that needs inputs.

    Args:
        net: The network.
        training: Whether to trace in training mode.
    """
    if isinstance(net, Traced):
        return net.graph
    leaves = [module for module in net.modules() if isinstance(module, MARKED)]
    try:
        return trace(net, training=training, leaves=leaves)
    except TypeError as error:
        _refuse_reads(net, error.__cause__)
        return None


def _refuse_subclass(name: str, module: nn.Module) -> None:
    """Raise a TypeError for a subclass of a marker, whose changes int8 would ignore."""
    kind = next((kind for kind in MARKED if isinstance(module, kind)), None)
    if kind is not None and type(module) is not kind:
        raise TypeError(
            f"prepare: {name} is {type_of(module)}, a subclass of {kind.__name__} whose "
            f"changes int8 would ignore; use {kind.__name__} itself, and move the changes outside "
            "the integer region, to a module that is not a marker of bqnn"
        )


def _refuse_reads(net: nn.Module, error: BaseException | None) -> None:
    """Raise a TypeError if `forward` failed because it reads an attribute of a fused layer."""
    if isinstance(error, AttributeError) and isinstance(error.obj, Fused):
        weight = next(error.obj.parameters())  # the trace ran in a copy that shares parameters
        name = next(n for n, m in net.named_modules() if next(m.parameters(False), None) is weight)
        name = name.removesuffix(".layer")
        raise TypeError(
            f"prepare: forward reads {error.name} of {name}, a {type(error.obj.layer).__name__} "
            "that becomes integers and loses it; read it in __init__, or compute it from the inputs"
        ) from None


def _follow(graph: fx.Graph, modules: Mapping[str, nn.Module], traced: Traced | None) -> None:
    """Track which nodes lie on a grid, and raise a TypeError for forbidden operations on them."""
    origins: dict[fx.Node, str] = {}  # nodes on a grid, and the module that rounded them
    for node in graph.nodes:
        inputs = [each for each in node.all_input_nodes if each in origins]
        if node.op == "call_module":
            name, module = str(node.target), modules[str(node.target)]
            before = [origins[each] for each in inputs]
            if _is_on_grid_after(name, module, before, node, traced):
                is_new = isinstance(module, (Enter, *COMPUTING))
                origins[node] = name if is_new else origins[inputs[0]]
        elif node.op == "output" and inputs:
            raise TypeError(
                f"prepare: the output of {origins[inputs[0]]} leaves the network in integers; put "
                "a Leave after its last layer (bqnn.layers.markers)"
            )
        elif inputs and not _only_asks(node):
            origin = origins[inputs[0]]
            args = fx.node.map_arg(node.args, lambda each: each if each in origins else 0)
            kwargs = fx.node.map_arg(node.kwargs, lambda each: each if each in origins else 0)
            first = args[0] if args else None
            if first not in inputs or not keeps_grid(function_of(node), args, kwargs):
                remedy = f"{traced.remedy(node)}, or {SUPPORTED}" if traced else ""
                raise TypeError(f"prepare: {refusal(_named(node), origin, remedy)}")
            origins[node] = origin


def _is_on_grid_after(
    name: str, module: nn.Module, origins: list[str], node: fx.Node, traced: Traced | None
) -> bool:
    """Return whether a module's output lies on a grid; TypeError if its inputs are invalid."""
    kind, num_inputs = type(module).__name__, len(node.all_input_nodes)
    if isinstance(module, Enter):
        if origins:
            raise TypeError(
                f"prepare: {name} is an Enter inside the integer region, after {origins[0]}; "
                "remove it, or put a Leave before it"
            )
        return True
    if isinstance(module, (Leave, *COMPUTING)):
        if len(origins) < num_inputs:
            what = type(module.layer).__name__ if isinstance(module, Fused) else kind
            raise TypeError(
                f"prepare: {name} is {with_article(what)} outside the integer region; put an Enter "
                "before it, and a Leave only after the last layer (bqnn.layers.markers)"
            )
        return not isinstance(module, Leave)
    if not origins:
        return False
    if not isinstance(module, KEEPING) or getattr(module, "return_indices", False):
        remedy = f"{_kept(traced, node, module)}, or {SUPPORTED}" if traced else ""
        named = f"{name}, {with_article(kind)},"
        raise TypeError(f"prepare: {refusal(named, origins[0], remedy)}")
    return True


def _kept(net: Traced, node: fx.Node, module: nn.Module) -> str:
    """Return how to keep a module in float, alone or with all others of its type."""
    are_many = sum(type(other) is type(module) for _, _, other in net.named_calls()) > 1
    if are_many and not isinstance(
        module, (*KEEPING, *ACTIVATIONS, nn.BatchNorm1d, nn.BatchNorm2d)
    ):
        return f"{net.remedy(node)}, or all of its type with keep=({type_name(module)},)"
    return net.remedy(node)


def _only_asks(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return getattr(getattr(Tensor, str(node.args[1]), None), "__get__", None) in ASKING
    return function_of(node) in ASKING


def _named(node: fx.Node) -> str:
    """Return the name of the function that a node calls, and the calling module, as text."""
    called: Any = node.args[1] if node.target is getattr else node.target
    name = called if isinstance(called, str) else called.__name__
    return f"{name}, called by {caller_of(node) or 'the network itself'},"
