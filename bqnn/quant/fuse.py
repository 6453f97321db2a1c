"""Fusion of linear layers and convolutions with the batch norm and ReLU that follow them."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from bqnn.layers.bayes import BayesConv2d, BayesLinear, GaussianWeight
from bqnn.layers.chain import is_chain
from bqnn.layers.linear_map import Geometry
from bqnn.layers.markers import Add, Enter, Leave
from bqnn.layers.swap import check_plain, check_unshared, owns_parameters, refuse_unknown
from bqnn.layers.trace import trace
from bqnn.quant.traced import Traced

Layer = nn.Linear | nn.Conv2d | BayesLinear | BayesConv2d
LAYERS = (nn.Linear, nn.Conv2d, BayesLinear, BayesConv2d)

# The parameters and buffers that fusion reads from each type of module.
_PARTS: dict[type[nn.Module], tuple[tuple[str, ...], tuple[str, ...]]] = {
    nn.Linear: (("weight", "bias"), ()),
    nn.Conv2d: (("weight", "bias"), ()),
    BayesLinear: (("mean", "rho", "bias"), ("loadings",)),
    BayesConv2d: (("mean", "rho", "bias"), ("loadings",)),
    nn.BatchNorm1d: (("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")),
    nn.BatchNorm2d: (("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")),
    nn.ReLU: ((), ()),
    nn.ReLU6: ((), ()),
}
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
ACTIVATIONS: dict[type[nn.Module], float | None] = {nn.ReLU: None, nn.ReLU6: 6.0}  # upper bounds


def is_replaced(module: nn.Module) -> bool:
    """Return whether fusion may replace a module with parameters, apart from those it keeps."""
    return type(module) in _PARTS and owns_parameters(module)


class Fused(nn.Module):
    """relu(bn(layer(x))), where batch norm and ReLU are optional.

    It computes the same as its parts. `prepare` converts it to a fake-quantized layer.

    Args:
        layer: A linear layer or convolution, with point-valued or Gaussian weights.
        bn: The batch norm, or None. After a linear layer, inputs must be [B, F].
        relu: Whether a ReLU follows.
        cap: The upper bound of the ReLU, 6 for ReLU6; None for no bound.
        is_output: Whether a Leave follows directly, so that no integer layer reads the outputs.
    """

    def __init__(
        self,
        layer: Layer,
        bn: BatchNorm | None = None,
        relu: bool = False,
        cap: float | None = None,
        is_output: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.bn = bn
        self.relu = relu
        self.cap = cap
        self.is_output = is_output
        self.geometry: Geometry | None = None
        if isinstance(layer, nn.Conv2d):
            self.geometry = Geometry.of(layer)
        elif isinstance(layer, BayesConv2d):
            self.geometry = layer.geometry

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.bn is not None:
            check_features(x, self.bn)
            x = self.bn(x)
        return activated(x, self.cap) if self.relu else x

    def extra_repr(self) -> str:
        return f"relu={self.relu}" + ("" if self.cap is None else f", cap={self.cap:g}")


def activated(x: Tensor, cap: float | None) -> Tensor:
    """Apply a ReLU with an upper bound, or without if `cap` is None."""
    return x.relu() if cap is None else x.clamp(0, cap)


def check_features(x: Tensor, bn: BatchNorm) -> None:
    """Raise a ValueError if a batch norm after a linear layer does not normalize the features."""
    if isinstance(bn, nn.BatchNorm1d) and x.dim() != 2:
        raise ValueError(
            f"a BatchNorm1d after a Linear with outputs of shape {tuple(x.shape)} does not "
            "normalize the features, so it cannot be fused; pass inputs [B, in_features]"
        )


def fuse(net: nn.Module) -> nn.Module:
    """Fuse each layer with the batch norm and the ReLU or ReLU6 that follow it, in place.

    In a network that `bqnn.quant.mark.mark` has traced, a follower is the only reader of a layer's
    output. In other networks, it is the next module of a Sequential; fused modules are replaced by
    nn.Identity there, so that the names of other modules do not change.

    Args:
        net: The network. It stays unchanged when an error is raised.

    Returns:
        The network.

    Raises:
        ValueError: The network is fused already, or has no linear layer or convolution.
        TypeError: A module with parameters is not supported, such as a batch norm that does not
            follow a convolution. The message names it.

    Examples:
        >>> net = fuse(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        >>> type(net[0]), type(net[1])
        (<class 'bqnn.quant.fuse.Fused'>, <class 'torch.nn.modules.linear.Identity'>)
    """
    if any(isinstance(module, Fused) for module in net.modules()):
        raise ValueError("fuse: the network is already fused; call prepare() on it")
    traced = [module for module in net.modules() if isinstance(module, Traced)]
    if traced:
        for part in traced:
            _fuse_graph(part)
        return net
    _check_parts(net, list(net.named_modules(remove_duplicate=False)))
    if not isinstance(net, LAYERS):
        _refuse_unknown("the network", net)
    floats = _outside_region(net)
    places = [
        (parent, *place)
        for path, parent in net.named_modules()
        if not isinstance(parent, LAYERS) and parent not in floats
        for place in _places(path, parent, floats)
    ]
    if not places:
        raise ValueError("fuse: the network has no linear layer or convolution to quantize")
    for parent, name, module in places:
        setattr(parent, name, module)
    return net


def _fuse_graph(net: Traced) -> None:
    """Fuse the layers of a traced network, and each sum with the ReLU that follows it."""
    modules = {name: module for _, name, module in net.named_calls()}
    _check_parts(net, [(name, modules[name]) for name in modules if name not in net.kept])
    fused: dict[str, Fused] = {}
    gone: list[tuple[fx.Node, fx.Node]] = []  # calls that are fused into others
    for name, chains in followers(net).items():
        followed: list[nn.Module | None] = [modules[str(node.target)] for node in chains[0][1]]
        ends = [nodes[-1] if nodes else call for call, nodes in chains]
        is_output = all(_is_read_by(end, Leave, modules) for end in ends)
        with _at(name):
            fused[name] = _fused(modules[name], followed + [Leave()] * is_output)
        gone += [(node, call) for call, nodes in chains for node in nodes]
    for node, name, module in net.named_calls():
        is_sum = isinstance(module, Add) and not module.relu and len(node.users) == 1
        if is_sum and _is_read_by(node, nn.ReLU, modules):
            net.set_submodule(name, Add().train(module.training))
            gone.append((next(iter(node.users)), node))
    for name, layer in fused.items():
        net.set_submodule(name, layer)
    for node, call in gone:
        node.replace_all_uses_with(call)
    for node, _ in reversed(gone):
        net.graph.erase_node(node)
    left = {name for _, name, _ in net.named_calls()}
    for name in {str(node.target) for node, _ in gone} - left:
        net.delete_submodule(name)
    net.recompile()


def followers(net: Traced) -> dict[str, list[tuple[fx.Node, list[fx.Node]]]]:
    """Return the calls of each layer, with those that can be fused with each call.

    If a layer is called several times, only what follows each of its calls can be fused.
    """
    modules = {name: m for _, name, m in net.named_calls() if name not in net.kept}
    found: dict[str, list[tuple[fx.Node, list[fx.Node]]]] = {}
    for node, name, module in net.named_calls():
        if type(module) in LAYERS and name in modules:
            found.setdefault(name, []).append((node, _chain(node, modules)))
    for name, chains in found.items():
        kinds = [[_kind(modules[str(n.target)]) for n in nodes] for _, nodes in chains]
        are_equal = [len(set(each)) == 1 for each in zip(*kinds, strict=False)]
        length = [*are_equal, False].index(False)
        found[name] = [(node, nodes[:length]) for node, nodes in chains]
    return found


def _chain(call: fx.Node, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """Return the calls of the batch norm and the ReLU that directly follow the call of a layer."""
    chain: list[fx.Node] = []
    is_linear = isinstance(modules[str(call.target)], nn.Linear | BayesLinear)
    norm = nn.BatchNorm1d if is_linear else nn.BatchNorm2d
    for kinds in ((norm,), tuple(ACTIVATIONS)):
        last = chain[-1] if chain else call
        users = list(last.users)
        if len(users) == 1 and type(modules.get(str(users[0].target))) in kinds:
            chain.append(users[0])
    return chain


def _kind(module: nn.Module) -> object:
    return type(module) if type(module) in ACTIVATIONS else module


def _is_read_by(node: fx.Node, kind: type[nn.Module], modules: Mapping[str, nn.Module]) -> bool:
    """Return whether all readers of a call's output are modules of a type."""
    return all(
        user.op == "call_module" and type(modules[str(user.target)]) is kind for user in node.users
    )


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Prefix the message of a TypeError with the name of a module."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{place}: {error}") from None


def _outside_region(net: nn.Module) -> set[nn.Module]:
    """Return the modules with parameters that are called outside of Enter and Leave.

    They stay in float with all that they contain. Layers are not among them, because a layer
    outside is a mistake that `prepare` names. An empty set if `forward` cannot be traced, or
    without an Enter.
    """
    if not any(isinstance(module, Enter) for module in net.modules()):
        return set()
    try:
        graph = trace(net)
    except TypeError:
        return set()
    on_grid: set[fx.Node] = set()
    inside, outside = set[nn.Module](), set[nn.Module]()
    for node in graph.nodes:
        module = net.get_submodule(str(node.target)) if node.op == "call_module" else None
        reads = any(source in on_grid for source in node.all_input_nodes)
        if isinstance(module, Enter) or (reads and not isinstance(module, Leave)):
            on_grid.add(node)
        if module is not None and type(module) not in LAYERS:
            (inside if reads else outside).update(module.modules())
    return outside - inside


def _places(
    path: str, parent: nn.Module, floats: Collection[nn.Module]
) -> list[tuple[str, nn.Module]]:
    """Return the names and replacements of a module's children, without changing the module."""
    places: dict[str, nn.Module] = {}
    chain = list(parent._modules) if is_chain(parent) else []
    for name, child in parent._modules.items():
        place = f"{path}.{name}".lstrip(".")
        if name in places or child in floats:  # fused into the layer before it, or in float
            continue
        if type(child) in LAYERS:
            followers = chain[chain.index(name) + 1 :] if chain else []
            with _at(place):
                fused = _fused(child, [parent._modules[each] for each in followers])
            places[name] = fused
            taken = (fused.bn is not None) + fused.relu
            places.update((each, nn.Identity()) for each in followers[:taken])
        else:
            _refuse_unknown(place, child)
    return list(places.items())


def _fused(layer: Any, followers: list[nn.Module | None]) -> Fused:
    """Fuse a layer with the batch norm and the ReLU that directly follow it."""
    bn, relu, cap = None, False, None
    norm = nn.BatchNorm1d if isinstance(layer, nn.Linear | BayesLinear) else nn.BatchNorm2d
    if followers and type(followers[0]) is norm:
        bn = followers.pop(0)
    activation: Any = type(followers[0]) if followers else None
    if activation in ACTIVATIONS:
        relu, cap = True, ACTIVATIONS[activation]
        followers.pop(0)
    is_output = bool(followers) and type(followers[0]) is Leave
    assert bn is None or isinstance(bn, BatchNorm)
    if bn is not None and (bn.weight is None or bn.running_var is None):
        raise TypeError(
            "a batch norm without affine parameters or running statistics cannot be fused; create "
            "it with affine=True and track_running_stats=True"
        )
    channels = len(next(layer.parameters()))
    if bn is not None and bn.num_features != channels:
        raise TypeError(
            f"a {type(bn).__name__}({bn.num_features}) after {channels} outputs normalizes another "
            "axis, so it cannot be fused; keep it in float with keep=(its name,), or put a Leave "
            "before it"
        )
    return Fused(layer, bn, relu, cap, is_output).train(layer.training)


def _refuse_unknown(path: str, module: nn.Module | None) -> None:
    if module is not None and owns_parameters(module):
        refuse_unknown(
            path,
            module,
            "quantization does not support; it supports linear layers, convolutions, and a batch "
            "norm directly after a convolution in a Sequential",
        )


def _check_parts(net: nn.Module, named: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise a TypeError if fusion would lose or duplicate a part of one of the named modules."""
    check_unshared(net, _PARTS)
    places: dict[nn.Module, str] = {}
    for path, module in named:
        if type(module) in _PARTS:
            check_plain(path, module, *_PARTS[type(module)])
        first = places.setdefault(module, path)
        if isinstance(module, GaussianWeight) and first != path:
            raise TypeError(
                f"{first} and {path} are one Bayesian layer, which would get two draws after "
                "quantization; use two layers"
            )
