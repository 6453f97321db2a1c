"""Operations that change a tensor in place, in a traced network."""

import operator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bqnn.layers.trace import caller_of, function_of, is_tensor
from bqnn.quant.traced import Traced

# Functions and modules whose results may share memory with their first input.
VIEWS = frozenset(
    getattr(owner, name)
    for owner, names in (
        (Tensor, "chunk contiguous detach expand flatten float movedim narrow permute reshape"),
        (Tensor, "select split squeeze swapaxes to transpose unbind unflatten unsqueeze view"),
        (Tensor, "view_as"),
        (torch, "chunk detach flatten movedim narrow permute reshape select split squeeze"),
        (torch, "swapaxes transpose unbind unflatten unsqueeze"),
        (operator, "getitem"),
        (F, "dropout dropout1d dropout2d dropout3d"),
    )
    for name in names.split()
)
VIEW_MODULES = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.Flatten,
    nn.Identity,
    nn.Unflatten,
)
OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")


def follow_changes(net: Traced) -> None:
    """Redirect later readers of a value that an operation changes in place to its result.

    Args:
        net: The network.

    Raises:
        TypeError: A later reader reads the value through a view, such as a slice.
    """
    place = {node: index for index, node in enumerate(net.graph.nodes)}
    for node in net.graph.nodes:
        if not changes(net, node):
            continue
        changed = node.all_input_nodes[0]
        for user in list(changed.users):
            if place[user] > place[node]:
                user.replace_input_with(changed, node)
        for alias in _aliases(net, changed, node):
            if any(place[user] > place[node] for user in alias.users):
                raise TypeError(
                    f"mark: {node.name}, called by {caller_of(node) or 'the network itself'}, "
                    f"changes {changed.name} in place, which is read later as {alias.name}; use "
                    "an operation that returns a new tensor"
                )


def changes(net: nn.Module, node: fx.Node) -> bool:
    """Return whether a call in the graph of a network changes its first argument in place."""
    if not node.all_input_nodes or not is_tensor(node.all_input_nodes[0]):
        return False
    if node.op == "call_module":
        return bool(getattr(net.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    is_operator = getattr(node.target, "__module__", "") == "_operator"
    changes = name.endswith("_") or (is_operator and name in OPERATORS)
    return bool(changes or node.kwargs.get("inplace", False))


def _aliases(net: Traced, node: fx.Node, change: fx.Node) -> set[fx.Node]:
    """Return the other nodes that may share memory with a node, apart from those of its change."""
    found: set[fx.Node] = set()
    ahead = [node]
    while ahead:
        alias = ahead.pop()
        near = [user for user in alias.users if _is_view(net, user)]
        near += alias.all_input_nodes[:1] if _is_view(net, alias) else []
        near = [each for each in near if each not in (node, change, *found)]
        ahead += near
        found.update(near)
    return found


def _is_view(net: Traced, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(net.get_submodule(str(node.target)), VIEW_MODULES)
    return node.op.startswith("call_") and function_of(node) in VIEWS
