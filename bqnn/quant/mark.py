"""Mark a network of plain torch: trace it, and insert the markers that quantization looks for."""

from collections.abc import Collection
from fnmatch import fnmatchcase
from itertools import zip_longest

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bqnn.arguments import ArgumentError, ArgumentTypeError
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.markers import Enter, Leave
from bqnn.layers.swap import check_no_hooks, refuse_unknown
from bqnn.layers.trace import UntraceableError, caller_of, function_of, is_leaf, trace
from bqnn.quant.calls import ACTIVATIONS, pass_by_position, replace_calls
from bqnn.quant.fuse import LAYERS, Fused, is_replaced
from bqnn.quant.grids import kept_in_float
from bqnn.quant.in_place import follow_changes
from bqnn.quant.mark_region import mark_region
from bqnn.quant.traced import Traced, replace_call
from bqnn.text import short, type_of

DROPOUTS = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
# Linear layers as functions: their weights would stay in float.
LINEAR_CALLS = frozenset(
    getattr(owner, name)
    for owner, names in (
        (F, "linear bilinear conv1d conv2d conv3d"),
        (F, "conv_transpose1d conv_transpose2d conv_transpose3d"),
        (torch, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    )
    for name in names.split()
)
RANDOM_CALLS = frozenset(
    getattr(owner, name)
    for owner, names in (
        (torch, "bernoulli multinomial normal poisson rand rand_like randint randint_like randn"),
        (torch, "randn_like randperm"),
        (Tensor, "bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial"),
        (Tensor, "normal_ random_ uniform_"),
    )
    for name in names.split()
)
LINEAR_MODULES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)


# Types of modules, and globs over names of modules.
Keep = type[nn.Module] | str | Collection[type[nn.Module] | str]


def mark(net: nn.Module, *, keep: Keep = (), trains: bool = True) -> nn.Module:
    """Trace a network and mark its integer region.

    The region begins before the first linear layer or convolution and ends after the last. Calls
    of functions become modules that quantization knows: ReLU, dropout, residual sums,
    concatenations and average pools. All other modules keep their names.

    Args:
        net: The network. It is not changed, but shares its layers with the result.
        keep: Types of modules, and globs over the names of modules, that stay in float with all
            that they contain.
        trains: Whether the result is trained. If not, `forward` may do something else in training
            mode.

    Returns:
        The traced network. A network with its own Enter or Leave is returned as it is.

    Raises:
        ValueError: There is no linear layer or convolution, or an entry of `keep` matches nothing.
        TypeError: `forward` cannot be traced, or calls a layer that quantization does not support.

    Examples:
        >>> net = mark(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Softmax(1)))
        >>> [name for _, name, _ in net.named_calls()]
        ['enter', '0', '1', 'leave', '2']
    """
    if isinstance(net, Ensemble):
        parts = [mark(part, keep=keep, trains=trains) for part in (net.current, *net.members)]
        net.current, net.members = parts[0], nn.ModuleList(parts[1:])
        return net
    if any(isinstance(module, Enter | Leave | Fused) for module in net.modules()):
        if keep:
            raise ArgumentError(
                "keep: the network has its own Enter or Leave, which say what stays in float; "
                "leave out keep, or remove them",
                "keep",
            )
        return net
    if isinstance(net, LINEAR_MODULES):
        raise TypeError(f"mark: the network is {type_of(net)} itself; wrap it in nn.Sequential")
    kept = _kept(net, keep)
    _check_containers(net, kept)
    graph = _graph(net, kept, trains)
    marked = Traced(net, graph, kept)
    pass_by_position(marked)
    _check_linear(marked)
    _check_random(marked)
    _check_reads(marked)
    follow_changes(marked)
    _replace_dropout(marked)
    replace_calls(marked, list(graph.nodes), ACTIVATIONS)
    mark_region(marked)
    graph.lint()
    marked.recompile()
    return marked


def _kept(net: nn.Module, keep: Keep) -> set[nn.Module]:
    """Return the modules that stay in float."""
    kept: set[nn.Module] = set()
    named = dict(net.named_modules(remove_duplicate=False))
    del named[""]
    for entry in entries(keep):
        if isinstance(entry, str):
            found = {module for name, module in named.items() if fnmatchcase(name, entry)}
        elif isinstance(entry, type) and issubclass(entry, nn.Module):
            found = {module for module in named.values() if isinstance(module, entry)}
        else:
            raise ArgumentTypeError(
                f"keep: {short(entry)} is neither a type of modules nor a glob over their names",
                "keep",
            )
        if not found:
            shown = short(entry) if isinstance(entry, str) else entry.__name__
            raise ArgumentError(
                f"keep: {shown} matches no module; give a type, or a glob over the names of "
                "named_modules()",
                "keep",
            )
        kept |= found
    return kept


def entries(keep: Keep) -> list[type[nn.Module] | str]:
    """Return the entries of `keep`, which may be a single one."""
    is_one = isinstance(keep, str) or not isinstance(keep, Collection)
    return [keep] if is_one else list(keep)  # type: ignore[list-item, arg-type]


def _graph(net: nn.Module, kept: Collection[nn.Module], trains: bool) -> fx.Graph:
    """Trace a network in evaluation mode; if it trains, dropout becomes a module.

    Raises:
        TypeError: The network cannot be traced, or computes something else in training mode.
    """
    try:
        graph = trace(net, leaves=kept)
        other = trace(net, training=True, leaves=kept) if trains else graph
    except UntraceableError as error:
        raise TypeError(
            f"mark: {error}; {kept_in_float(error.module)}, or mark the integer region with Enter "
            "and Leave (bqnn.layers.markers)"
        ) from error
    for node, twin in zip_longest(graph.nodes, other.nodes):
        if node is None or twin is None or _signature(node) != _signature(twin):
            found = twin if twin is not None and twin.op != "output" else node
            caller = caller_of(found) or "the network itself"
            raise TypeError(
                f"mark: forward computes something else in training than in evaluation (the first "
                f"difference is {found.name}, called by {caller}); build the network without it, "
                f"quantize it after training, or {kept_in_float(caller_of(found))}"
            )
        if node.target in DROPOUTS:
            node.meta["drops"] = twin.kwargs["training"] and not node.kwargs["training"]
    return graph


def _signature(node: fx.Node) -> object:
    """Return what must be equal in training and evaluation mode."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda each: each.name)
    if node.target in DROPOUTS:
        kwargs = {key: value for key, value in kwargs.items() if key != "training"}
    return node.op, node.target, repr(args), repr(kwargs)


def _replace_dropout(net: Traced) -> None:
    """Replace the calls that drop in training mode only by modules, which know their mode."""
    for node in list(net.graph.nodes):
        if node.meta.get("drops"):
            module = DROPOUTS[node.target](node.kwargs["p"])
            replace_call(net, node, module, node.args[:1], caller_of(node))


def _check_containers(net: nn.Module, kept: Collection[nn.Module], name: str = "") -> None:
    """Raise a TypeError if a module that the trace replaces by what it calls has hooks."""
    if not is_leaf(net, kept):
        check_no_hooks(name or "the network", net)
        for child_name, child in net.named_children():
            _check_containers(child, kept, f"{name}.{child_name}".lstrip("."))


def _check_linear(net: Traced) -> None:
    """Raise a TypeError for linear layers that have no integers."""
    for _, name, module in net.named_calls():
        is_unknown = isinstance(module, LINEAR_MODULES) and type(module) not in LAYERS
        if is_unknown and name not in net.kept:
            use = f"use nn.Linear or nn.Conv2d, or {kept_in_float(name)}"
            refuse_unknown(f"mark: {name}", module, f"quantization does not support; {use}")
    for node in net.graph.nodes:
        if function_of(node) in LINEAR_CALLS:
            raise TypeError(
                f"mark: {node.target.__name__}, called by {caller_of(node) or 'the network itself'}"
                ", is a layer without a module; use nn.Linear or nn.Conv2d, or "
                f"{kept_in_float(caller_of(node))}"
            )


def _check_random(net: Traced) -> None:
    """Raise a TypeError for random numbers, which differ between int8 and its simulation."""
    for node in net.graph.nodes:
        if function_of(node) in RANDOM_CALLS:
            raise TypeError(
                f"mark: {node.name}, called by {caller_of(node) or 'the network itself'}, draws "
                "random numbers in predictions; draw them in training mode only, or outside of the "
                "network, or use MC dropout or Bayesian layers (to_mcdropout, to_bayes)"
            )


def _check_reads(net: Traced) -> None:
    """Raise a TypeError if `forward` reads a tensor of a layer, which integers replace.

    Its dtype and device may be asked: an empty buffer of the network answers in its place.
    """
    names = {m: name for _, name, m in net.named_calls() if is_replaced(m)}
    for node in [node for node in net.graph.nodes if node.op == "get_attr"]:
        path, _, field = str(node.target).rpartition(".")
        layer = net.get_submodule(path)
        if layer not in names or names[layer] in net.kept:
            continue
        tensor = getattr(layer, field)
        for user in [user for user in node.users if _asks_type(user)]:
            name = f"like_{path}_{field}".replace(".", "_")
            net.register_buffer(name, tensor.new_empty(0, requires_grad=False))
            with net.graph.inserting_before(user):
                user.replace_input_with(node, net.graph.get_attr(name))
        if node.users:
            reader = caller_of(next(iter(node.users))) or "the network itself"
            raise TypeError(
                f"mark: {reader} reads the {field} of {names[layer]}, a {type(layer).__name__}, "
                f"which becomes integers; {kept_in_float(names[layer])}"
            )
        net.graph.erase_node(node)


def _asks_type(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in ("dtype", "device")
