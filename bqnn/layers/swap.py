"""Replace layers of a network by type, and refuse layers that cannot be replaced without loss."""

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from bqnn.arguments import ArgumentError
from bqnn.layers.chain import has_own_call
from bqnn.layers.markers import Quantized
from bqnn.layers.memory import is_one, shared
from bqnn.text import type_of, with_article

# The kinds of hooks of a module. Load-state-dict pre-hooks are missing on purpose, because
# `remove_spectral_norm` leaves one behind.
HOOKS = (
    "forward_pre_hooks",
    "forward_hooks",
    "backward_pre_hooks",
    "backward_hooks",
    "state_dict_pre_hooks",
    "state_dict_hooks",
    "load_state_dict_post_hooks",
)


def swap(
    net: nn.Module,
    replacements: Mapping[type[nn.Module], Callable[..., nn.Module]],
    *,
    keep: tuple[type[nn.Module], ...] = (),
) -> int:
    """Replace the layers of a network by type, in place.

    Subclasses of a type do not match. A layer that is used in several places stays one layer.

    Args:
        net: The network. It stays unchanged when an error is raised.
        replacements: For each type, a function that makes a module from a layer with a weight and
            a bias.
        keep: Types with parameters that are not replaced. Those of torch.nn stay whole, because
            they read the parameters of the layers inside.

    Returns:
        The number of replaced layers.

    Raises:
        TypeError: A layer has a part that its replacement would lose (see `check_plain`), shares a
            parameter with another layer, or has parameters and an unknown type.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> swap(net, {nn.Linear: lambda layer: nn.Linear(3, 5)})
        1
        >>> net[0]
        Linear(in_features=3, out_features=5, bias=True)
    """
    known = ", ".join(kind.__name__ for kind in (*replacements, *keep))
    if owns_parameters(net) and not isinstance(net, (*replacements, *keep)):
        refuse_unknown("the network", net, _unknown(net, known))
    check_unshared(net, replacements)
    made: dict[nn.Module, nn.Module] = {}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    whole = {part for m in net.modules() if isinstance(m, keep) for part in _parts_read_by(m)}
    for name, parent in net.named_modules():
        for child_name, child in parent._modules.items():
            if child is None or child in whole:
                continue
            path = f"{name}.{child_name}" if name else child_name
            if type(child) in replacements:
                _check_unread(path, parent)
                check_plain(path, child, parameters=("weight", "bias"))
                _check_no_gradient_hooks(path, child)
                if child not in made:
                    made[child] = _made(path, replacements[type(child)], child)
                places.append((parent, child_name, made[child]))
            elif owns_parameters(child) and not isinstance(child, keep):
                refuse_unknown(path, child, _unknown(child, known))
    for parent, child_name, module in places:
        setattr(parent, child_name, module)
    return len(made)


def _unknown(module: nn.Module, known: str) -> str:
    """Return why a module with parameters is not converted, and how to keep them."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    is_converted_inside = module._modules and not any(True for _ in _parts_read_by(module))
    return (
        f"this conversion does not support; it supports {known}; keep=({type_name(module)},) "
        f"leaves its own parameters ({shown}) as they are"
        + (", and converts the layers inside" if is_converted_inside else "")
    )


def type_name(module: nn.Module) -> str:
    """Return the name of a module's type as in code: `nn.SiLU`, or the class's name alone.

    Examples:
        >>> type_name(nn.SiLU())
        'nn.SiLU'
    """
    kind = type(module)
    is_of_torch = getattr(nn, kind.__name__, None) is kind
    return f"nn.{kind.__name__}" if is_of_torch else kind.__name__


def _parts_read_by(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers inside a module of torch.nn that may read their parameters."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, containers):
        parts = module.modules()
        next(parts)  # the module itself
        yield from parts


def _check_unread(path: str, parent: nn.Module) -> None:
    """Raise a TypeError if the module that contains a layer reads its parameters."""
    if any(True for _ in _parts_read_by(parent)):
        kind = type(parent).__name__
        raise TypeError(
            f"{path} is a part of {with_article(kind)} of torch.nn, which reads its parameters; "
            f"name nn.{kind} in `keep` to leave them as they are"
        )


def check_plain(
    path: str,
    layer: nn.Module,
    parameters: Collection[str] = (),
    buffers: Collection[str] = (),
) -> None:
    """Check that a conversion would not lose a part of a layer.

    The legacy versions of spectral norm, weight norm and pruning compute the weight in a hook,
    from parameters with other names. A conversion would lose them, and any hook of the user.

    Args:
        path: The name of the layer, for the error message.
        layer: The layer.
        parameters: The names of the parameters that the conversion reads.
        buffers: The names of the buffers that the conversion reads.

    Raises:
        TypeError: The layer has other parameters, buffers, tensors, children or hooks, or lacks a
            parameter.
    """
    if any(param is not None and is_lazy(param) for param in layer._parameters.values()):
        refuse_unknown(path, layer, "has no sizes yet")
    lacking = [name for name in parameters if not _has(layer, name)]
    # Legacy weight norm replaces a parameter by a plain tensor.
    plain = [name for name, value in vars(layer).items() if isinstance(value, Tensor)]
    others = [
        *sorted(layer._parameters.keys() - set(parameters)),
        *(f"buffer {name}" for name in layer._buffers if name not in buffers),
        *(f"plain tensor {name}" for name in plain),
    ]
    if lacking or others:
        found = ", ".join(others) or "no " + ", ".join(lacking)
        raise TypeError(
            f"{path} is {type_of(layer)} with {found}, which a conversion would lose; "
            "if spectral norm, weight norm or pruning added it, call "
            "torch.nn.utils.remove_spectral_norm, remove_weight_norm or prune.remove first"
        )
    for name, param in layer._parameters.items():
        if param is not None and not param.is_floating_point():
            raise TypeError(
                f"{path}.{name} has dtype {param.dtype}, which no conversion supports; use float32"
            )
    if layer._modules:
        raise TypeError(
            f"{path} is {type_of(layer)} with child modules "
            f"({', '.join(layer._modules)}), which a conversion would lose; move them out of it"
        )
    check_no_hooks(path, layer)


def check_no_hooks(path: str, module: nn.Module) -> None:
    """Raise a TypeError if a module that a conversion replaces has hooks."""
    hooks = [kind for kind in HOOKS if getattr(module, f"_{kind}")]
    hooks += ["a replaced forward"] if "forward" in vars(module) else []
    if not hooks and has_own_call(module):
        raise TypeError(
            f"{path} is a {type(module).__name__} with its own __call__, which a conversion would "
            "lose; move what it does to forward"
        )
    if hooks:
        raise TypeError(
            f"{path} has {', '.join(hooks).replace('_', ' ')}, which a conversion would lose; "
            "remove them first, and add them to the converted module"
        )


def check_float(net: nn.Module, caller: str) -> None:
    """Raise an ArgumentError if a network is quantized already."""
    if any(isinstance(module, Quantized) for module in net.modules()):
        raise ArgumentError(
            f"net: it is quantized already; call {caller} on the network in float, and quantize "
            "the result",
            "net",
        )


def check_no_loose_tensors(net: nn.Module) -> None:
    """Raise a TypeError if a module holds a tensor that is neither a parameter nor a buffer.

    A copy of the network would lack it, or could not be made.
    """
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                owner = f"{path}.{name}" if path else name
                raise TypeError(
                    f"{owner} is a tensor but neither a parameter nor a buffer, as the legacy "
                    "spectral norm, weight norm and pruning create it; use "
                    "torch.nn.utils.parametrizations, or register_buffer for your own tensor"
                )


def check_unshared(net: nn.Module, kinds: Collection[type[nn.Module]]) -> None:
    """Raise a TypeError if a layer of these types shares memory with another tensor.

    A conversion would break the sharing.

    Args:
        net: The network.
        kinds: Types of the layers that a conversion replaces; subclasses do not match.
    """
    for first, second in shared(net):
        if type(first.module) in kinds or type(second.module) in kinds:
            are = "are one parameter" if is_one(first, second) else "share memory"
            raise TypeError(
                f"{first.name} and {second.name} {are}, and a conversion would separate them; give "
                "each layer its own parameter, or call one layer twice"
            )


def check_copied_as_one(net: nn.Module) -> None:
    """Raise a TypeError if different parameters share memory, which copies would separate.

    One parameter under two names passes: a copy keeps it as one.
    """
    for first, second in shared(net):
        if first.tensor is not second.tensor:
            raise TypeError(
                f"{first.name} and {second.name} share memory, and a copy of the network would "
                "separate them; give each module its own parameter, or both the same nn.Parameter"
            )


def owns_parameters(module: nn.Module) -> bool:
    """Return whether a module has parameters itself, not only in its children."""
    return parametrize.is_parametrized(module) or any(
        True for _ in module.parameters(recurse=False)
    )


def refuse_unknown(path: str, module: nn.Module, reason: str) -> None:
    """Raise a TypeError for a module that a conversion does not support, with a remedy."""
    if parametrize.is_parametrized(module):
        remedy = "; call torch.nn.utils.parametrize.remove_parametrizations on it first"
    elif any(is_lazy(param) for param in module.parameters(recurse=False)):
        remedy = "; pass a batch through the network first, which sets the sizes of its layers"
    else:
        remedy = ""
    raise TypeError(f"{path} is {type_of(module)}, which {reason}{remedy}")


def _has(layer: nn.Module, parameter: str) -> bool:
    """Return whether a layer has a parameter. Biases and batch norm parameters may be None."""
    may_be_none = parameter == "bias" or isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
    return layer._parameters.get(parameter) is not None or (
        may_be_none and parameter in layer._parameters
    )


def _check_no_gradient_hooks(path: str, layer: nn.Module) -> None:
    """Raise a TypeError if a parameter has hooks, which a conversion would lose."""
    for name, param in layer.named_parameters(recurse=False):
        if param._backward_hooks or param._post_accumulate_grad_hooks:
            raise TypeError(
                f"{path}.{name} has gradient hooks, which a conversion would lose; register them "
                "on the parameters of the converted layer"
            )


def _made(path: str, make: Callable[..., nn.Module], layer: nn.Module) -> nn.Module:
    try:
        return make(layer).train(layer.training)
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from error
