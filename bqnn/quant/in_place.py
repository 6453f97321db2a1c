"""Operations that change a tensor in place, in a traced network."""

import operator

import torch
from torch import Tensor, fx

from bqnn.layers.trace import caller_of, function_of, is_tensor
from bqnn.quant.traced import Traced

# Functions whose results share memory with their first argument.
VIEWS = frozenset(
    getattr(owner, name)
    for owner, names in (
        (Tensor, "chunk detach flatten movedim narrow permute reshape select split squeeze"),
        (Tensor, "swapaxes transpose unbind unflatten unsqueeze view view_as"),
        (torch, "chunk detach flatten movedim narrow permute reshape select split squeeze"),
        (torch, "swapaxes transpose unbind unflatten unsqueeze"),
        (operator, "getitem"),
    )
    for name in names.split()
)
OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")


def follow_changes(net: Traced) -> None:
    """Let later readers of a value that an operation changes in place read its result."""
    place = {node: index for index, node in enumerate(net.graph.nodes)}
    for node in net.graph.nodes:
        if not _changes(net, node):
            continue
        changed = node.args[0]
        for user in list(changed.users):
            if place[user] > place[node]:
                user.replace_input_with(changed, node)
        source = changed
        while function_of(source) in VIEWS and source.args and source.op.startswith("call_"):
            source = source.args[0]
            if any(place[user] > place[node] for user in source.users):
                raise TypeError(
                    f"mark: {node.name}, called by {caller_of(node) or 'the network itself'}, "
                    f"changes a part of {source.name} in place, which is read later; use an "
                    "operation that returns a new tensor"
                )


def _changes(net: Traced, node: fx.Node) -> bool:
    """Return whether a call changes its first argument in place."""
    if not (node.args and isinstance(node.args[0], fx.Node) and is_tensor(node.args[0])):
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
