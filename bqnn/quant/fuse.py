"""Fusion of linear layers and convolutions with the batch norm and ReLU that follow them."""

from typing import Any

from torch import Tensor, nn

from bqnn.layers.bayes import BayesConv2d, BayesLinear, GaussianWeight
from bqnn.layers.chain import is_chain
from bqnn.layers.linear_map import Geometry
from bqnn.layers.markers import Leave
from bqnn.layers.swap import check_plain, check_unshared, owns_parameters, refuse_unknown

Layer = nn.Linear | nn.Conv2d | BayesLinear | BayesConv2d
LAYERS = (nn.Linear, nn.Conv2d, BayesLinear, BayesConv2d)

# The parameters and buffers that fusion reads from each type of module.
_PARTS: dict[type[nn.Module], tuple[tuple[str, ...], tuple[str, ...]]] = {
    nn.Linear: (("weight", "bias"), ()),
    nn.Conv2d: (("weight", "bias"), ()),
    BayesLinear: (("mean", "rho", "bias"), ()),
    BayesConv2d: (("mean", "rho", "bias"), ()),
    nn.BatchNorm2d: (("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")),
    nn.ReLU: ((), ()),
}


class Fused(nn.Module):
    """relu(bn(layer(x))), where batch norm and ReLU are optional.

    It computes the same as its parts. `prepare` converts it to a fake-quantized layer.

    Args:
        layer: A linear layer or convolution, with point-valued or Gaussian weights.
        bn: The batch norm, or None.
        relu: Whether a ReLU follows.
        is_output: Whether a Leave follows directly, so that no integer layer reads the outputs.
    """

    def __init__(
        self,
        layer: Layer,
        bn: nn.BatchNorm2d | None = None,
        relu: bool = False,
        is_output: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.bn = bn
        self.relu = relu
        self.is_output = is_output
        self.geometry: Geometry | None = None
        if isinstance(layer, nn.Conv2d):
            self.geometry = Geometry.of(layer)
        elif isinstance(layer, BayesConv2d):
            self.geometry = layer.geometry

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.bn is not None:
            x = self.bn(x)
        return x.relu() if self.relu else x

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


def fuse(net: nn.Module) -> nn.Module:
    """Fuse each layer in a Sequential with the batch norm and ReLU that follow it, in place.

    Fused modules are replaced by nn.Identity, so that the names of other modules do not change.

    Args:
        net: The network. It stays unchanged when an error is raised.

    Returns:
        The network.

    Raises:
        ValueError: The network is fused already, or has no linear layer or convolution.
        TypeError: A module with parameters is not supported, such as a batch norm that does not
            follow a convolution. The message names it.

    Example:
        >>> net = fuse(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        >>> type(net[0]), type(net[1])
        (<class 'bqnn.quant.fuse.Fused'>, <class 'torch.nn.modules.linear.Identity'>)
    """
    if any(isinstance(module, Fused) for module in net.modules()):
        raise ValueError("fuse: the network is already fused; call prepare() on it")
    _check_parts(net)
    if not isinstance(net, LAYERS):
        _refuse_unknown("the network", net)
    places = [
        (parent, *place)
        for path, parent in net.named_modules()
        if not isinstance(parent, LAYERS)
        for place in _places(path, parent)
    ]
    if not places:
        raise ValueError("fuse: the network has no linear layer or convolution to quantize")
    for parent, name, module in places:
        setattr(parent, name, module)
    return net


def _places(path: str, parent: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the names and replacements of a module's children, without changing the module."""
    places: dict[str, nn.Module] = {}
    chain = list(parent._modules) if is_chain(parent) else []
    for name, child in parent._modules.items():
        place = f"{path}.{name}".lstrip(".")
        if name in places:  # fused into the layer before it
            continue
        if type(child) in LAYERS:
            followers = chain[chain.index(name) + 1 :] if chain else []
            try:
                fused = _fused(child, [parent._modules[each] for each in followers])
            except TypeError as error:
                raise TypeError(f"{place}: {error}") from None
            places[name] = fused
            taken = (fused.bn is not None) + fused.relu
            places.update((each, nn.Identity()) for each in followers[:taken])
        else:
            _refuse_unknown(place, child)
    return list(places.items())


def _fused(layer: Any, followers: list[nn.Module | None]) -> Fused:
    """Fuse a layer with the batch norm and the ReLU that directly follow it."""
    bn, relu = None, False
    if followers and type(followers[0]) is nn.BatchNorm2d:
        bn = followers.pop(0)
    if followers and type(followers[0]) is nn.ReLU:
        relu = True
        followers.pop(0)
    is_output = bool(followers) and type(followers[0]) is Leave
    assert bn is None or isinstance(bn, nn.BatchNorm2d)
    if bn is not None and (bn.weight is None or bn.running_var is None):
        raise TypeError(
            "a batch norm without affine parameters or running statistics cannot be fused; create "
            "it with affine=True and track_running_stats=True"
        )
    return Fused(layer, bn, relu, is_output).train(layer.training)


def _refuse_unknown(path: str, module: nn.Module | None) -> None:
    if module is not None and owns_parameters(module):
        refuse_unknown(
            path,
            module,
            "quantization does not support; it supports linear layers, convolutions, and a batch "
            "norm directly after a convolution in a Sequential",
        )


def _check_parts(net: nn.Module) -> None:
    """Raise a TypeError if fusion would lose or duplicate a part of a module."""
    check_unshared(net, _PARTS)
    places: dict[nn.Module, str] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        if type(module) in _PARTS:
            check_plain(path, module, *_PARTS[type(module)])
        first = places.setdefault(module, path)
        if isinstance(module, GaussianWeight) and first != path:
            raise TypeError(
                f"{first} and {path} are one Bayesian layer, which would get two draws after "
                "quantization; use two layers"
            )
