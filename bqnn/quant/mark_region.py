"""Mark the integer region of a traced network: from its first layer to its last."""

import logging
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, fx, nn

from bqnn.layers.markers import AvgPool, Enter, Leave
from bqnn.layers.swap import owns_parameters
from bqnn.layers.trace import function_of, is_tensor
from bqnn.quant.calls import SUMS_AND_POOLS, replace_calls
from bqnn.quant.fuse import followers
from bqnn.quant.traced import Traced, replace_call

log = logging.getLogger(__name__)

SPLITTING = (torch.chunk, Tensor.chunk, torch.split, Tensor.split, torch.unbind, Tensor.unbind)
POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def mark_region(net: Traced) -> None:
    """Insert Enter and Leave, and replace calls between them by modules that compute in integers.

    Args:
        net: The network.

    Raises:
        ValueError: There is no linear layer or convolution.
    """
    _normalize_by_layers(net)
    inside = _inside(net)
    replaced = replace_calls(net, [n for n in net.graph.nodes if n in inside], SUMS_AND_POOLS)
    inside = {replaced.get(node, node) for node in inside}
    inside = _with_pools(net, inside)
    for node in inside:
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # integers may have another memory layout
    _insert_markers(net, inside)
    _warn_of_floats(net, inside)


def _with_pools(net: Traced, inside: Collection[fx.Node]) -> set[fx.Node]:
    """Replace average pools of the region by markers, and return the nodes of the region."""
    nodes = set(inside)
    outside = {name for node, name, _ in net.named_calls() if node not in nodes}
    for node, name, module in net.named_calls():
        if node in nodes and type(module) in POOLS:
            pool = AvgPool(module).train(module.training)
            if name in outside:  # keep the module for its call outside the region
                nodes.remove(node)
                nodes.add(replace_call(net, node, pool, node.args, name.rpartition(".")[0]))
            else:
                net.set_submodule(name, pool)
    return nodes


def _normalize_by_layers(net: Traced) -> None:
    """Insert a convolution with weights 1 before each batch norm that follows no layer.

    Batch norm is fused into it, and becomes a product and a sum for each channel.
    """
    fused = {node for found in followers(net).values() for _, nodes in found for node in nodes}
    inside = _inside(net)
    for node, name, module in net.named_calls():
        if type(module) is nn.BatchNorm2d and node in inside and node not in fused:
            channels = module.num_features
            with torch.random.fork_rng(devices=[]):
                layer = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
            nn.init.ones_(layer.weight.requires_grad_(False))
            layer.to(next(net.parameters()).device)
            (source,) = node.all_input_nodes
            with net.graph.inserting_before(node):
                made = net.insert_call(layer, (source,), name.rpartition(".")[0])
            node.replace_input_with(source, made)


def _inside(net: Traced) -> set[fx.Node]:
    """Return the nodes of the region: layers, what follows them, and all that leads to others."""
    chains = [chain for found in followers(net).values() for chain in found]
    if not chains:
        raise ValueError("mark: the network has no linear layer or convolution to quantize")
    layers = [call for call, _ in chains]
    after = _reached(layers, lambda node: node.users)
    before = _reached(layers, lambda node: node.all_input_nodes)
    inside = {*layers, *(node for _, nodes in chains for node in nodes), *(after & before)}
    inside -= {node for node, name, _ in net.named_calls() if name in net.kept}
    for node in net.graph.nodes:  # the parts of a tuple belong to it
        if any(n in inside and function_of(n) in SPLITTING for n in node.all_input_nodes):
            inside.add(node)
    return {node for node in inside if is_tensor(node)}


def _reached(
    start: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    """Return the nodes that can be reached in one or more steps."""
    found: set[fx.Node] = set()
    ahead = [node for each in start for node in step(each)]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            ahead.extend(step(node))
    return found


def _insert_markers(net: Traced, inside: Collection[fx.Node]) -> None:
    """Insert an Enter and a Leave wherever a tensor crosses the border of the region."""
    entered: dict[fx.Node, fx.Node] = {}
    for node in [node for node in net.graph.nodes if node in inside]:
        for source in node.all_input_nodes:
            if source not in inside and is_tensor(source):
                if source not in entered:
                    with net.graph.inserting_before(node):
                        entered[source] = net.insert_call(Enter(), (source,))
                node.replace_input_with(source, entered[source])
        readers = [user for user in node.users if user not in inside and _reads(user)]
        if readers:
            with net.graph.inserting_after(node):
                left = net.insert_call(Leave(), (node,))
            for user in readers:
                user.replace_input_with(node, left)


def _reads(node: fx.Node) -> bool:
    """Return whether a node reads the values of a tensor, and not only its size."""
    return node.op == "output" or is_tensor(node)


def _warn_of_floats(net: Traced, inside: Collection[fx.Node]) -> None:
    """Warn of modules with parameters that stay in float, apart from those that the user keeps."""
    names = [
        f"{name} ({type(module).__name__})"
        for node, name, module in net.named_calls()
        if node not in inside
        and name not in net.kept
        and any(map(owns_parameters, module.modules()))
    ]
    if names:
        log.warning(
            "outside of the integer region, these modules stay in float: %s", ", ".join(names)
        )
