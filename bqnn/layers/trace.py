"""Symbolic traces of networks, which show what `forward` calls and in which order."""

import builtins
import inspect
import operator
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import fx, nn

from bqnn.layers.draws import Stochastic
from bqnn.layers.markers import Add, AvgPool, Cat, DropoutSite, Enter, Leave, Pool
from bqnn.text import with_article

# What a trace asks the parameters of the network, and not a proxy.
OF_PARAMETERS = ("shape", "ndim", "size", "dim", "ndimension", "numel", "nelement")
SIZES = ("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "item")
# Modules whose calls a trace shows, and not what they call. (So are the modules of torch.nn.)
LEAVES = (Stochastic, DropoutSite, Enter, Leave, Add, Pool, AvgPool, Cat, nn.Linear, nn.Conv2d)


class UntraceableError(TypeError):
    """The `forward` of a network cannot be traced.

    Args:
        net: The network.
        module: The name of the module that cannot be traced; "" for the network itself.
        reason: Why it cannot.
    """

    def __init__(self, net: nn.Module, module: str, reason: str) -> None:
        kind = type(dict(net.named_modules())[module]).__name__
        name = f"{module}, {with_article(kind)}," if module else kind
        super().__init__(f"the forward of {name} cannot be traced: {reason}")
        self.module = module


def trace(
    net: nn.Module, *, training: bool = False, leaves: Collection[nn.Module] = ()
) -> fx.Graph:
    """Trace the `forward` of a network symbolically, without inputs.

    Arguments of `forward` that have defaults get them. Tensors that `forward` makes are attributes
    that the network does not have; their nodes have the value as `meta["constant"]`.

    Args:
        net: The network. It stays as it is: `forward` runs in a copy.
        training: Whether to trace in training mode.
        leaves: Further modules whose calls are shown, and not what they call.

    Raises:
        TypeError: The trace needs the values or shapes of inputs, or `forward` draws random
            numbers.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> [str(node.target) for node in trace(net).nodes][1:]
        ['0', '1', 'output']
    """
    traced, leaves = _copy(net, leaves)
    tracer = _Tracer(leaves)
    try:
        with torch.random.fork_rng(devices=[]), _recorded_len(net):
            before = torch.get_rng_state()
            graph = tracer.trace(traced.train(training), _defaults(net))
            if not torch.equal(before, torch.get_rng_state()):
                raise ValueError("it draws random numbers, which a trace would make constants")
    except Exception as error:  # a user's forward can raise anything when it is called with proxies
        raise UntraceableError(net, tracer.failed, _reason(error)) from error
    made = {name for name in vars(traced) if name.startswith("_tensor_constant")}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in made - vars(net).keys():
            node.meta["constant"] = getattr(traced, node.target)
    return graph


def _copy(net: nn.Module, leaves: Collection[nn.Module]) -> tuple[nn.Module, Collection[nn.Module]]:
    """Copy a network, because `forward` may set attributes; the copy shares the parameters.

    Returns:
        The copy, and its copies of `leaves`.
    """
    tensors = [x for m in net.modules() for x in vars(m).values() if isinstance(x, torch.Tensor)]
    memo: dict[int, Any] = {id(each): each for each in (*net.parameters(), *tensors)}
    try:
        copied = deepcopy(net, memo)
    except Exception as error:  # a user's attributes can raise anything
        raise UntraceableError(net, "", f"it cannot be copied: {_reason(error)}") from error
    return copied, {memo[id(leaf)] for leaf in leaves if id(leaf) in memo}


def is_leaf(module: nn.Module, leaves: Collection[nn.Module] = ()) -> bool:
    """Return whether a trace shows the calls of a module, and not what it calls."""
    is_of_torch = type(module).__module__.startswith("torch.nn")
    is_container = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return (is_of_torch and not is_container) or isinstance(module, LEAVES) or module in leaves


def function_of(node: fx.Node) -> Any:
    """Return the function that a node calls; of a method, that of torch.Tensor."""
    target = node.target
    return getattr(torch.Tensor, target, None) if isinstance(target, str) else target


def caller_of(node: fx.Node) -> str:
    """Return the name of the module that makes a call; "" for the network itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if node.op == "call_module":
        stack = stack[:-1]
    return str(stack[-1][0]) if stack else ""


def is_tensor(node: fx.Node) -> bool:
    """Return whether a node is a tensor, and not a size or a number made from sizes."""
    if node.op in ("placeholder", "get_attr", "call_module"):
        return True
    if node.op == "call_function" and node.target is getattr:
        return str(node.args[1]) not in ("shape", "ndim", "device", "dtype")
    if node.op == "call_method" and node.target in SIZES:
        return False
    if getattr(node.target, "__module__", "") in ("_operator", "math", "builtins"):
        return any(map(is_tensor, node.all_input_nodes))
    return True


class _Proxy(fx.Proxy):
    """Records operators such as `x += y`, which change x. Sizes of parameters are constants."""

    def __getattr__(self, k: str) -> Any:
        if self.node.op == "get_attr" and k in OF_PARAMETERS:
            assert isinstance(self.tracer, fx.Tracer)
            parameters = dict(self.tracer.root.named_parameters(remove_duplicate=False))
            return getattr(parameters[str(self.node.target)], k)
        return super().__getattr__(k)


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: _Proxy, other: Any) -> fx.Proxy:
        made: fx.Proxy = self.tracer.create_proxy("call_function", function, (self, other), {})
        return made

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Collection[nn.Module] = ()) -> None:  # fx makes one to unpickle
        super().__init__()
        self.leaves = leaves
        self.failed = ""  # the innermost module whose forward raised an error

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m, self.leaves)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, fx.proxy.TraceError) or not text:
        return "its control flow depends on values or shapes of the inputs, as in if, for or assert"
    return text[:120]


def _defaults(net: nn.Module) -> dict[str, Any]:
    """Return the arguments of `forward` that have defaults."""
    parameters = inspect.signature(type(net).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@contextmanager
def _recorded_len(net: nn.Module) -> Iterator[None]:
    """Let `len(x)`, which must return an int, record `x.size(0)` where the network calls it."""

    def length(x: Any) -> Any:
        return x.size(0) if isinstance(x, fx.Proxy) else builtins.len(x)

    namespaces = {
        id(space): space
        for module in net.modules()
        if not type(module).__module__.startswith("torch.")
        and "len" not in (space := getattr(type(module).forward, "__globals__", {}))
    }
    for space in namespaces.values():
        space["len"] = length
    try:
        yield
    finally:
        for space in namespaces.values():
            del space["len"]
