"""Replace layers of a network by type, and refuse layers that would lose something."""

from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from bqnn.layers.memory import is_one, shared

# Names of what may be hooked to a module. Those before loading a state are left out, since
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
    """Replace every layer whose exact type is a key with its value's result, in place.

    Args:
        net: the network; it stays as it is where anything is refused.
        replacements: for each type, what makes a module of a layer with a weight and a bias.
        keep: types with parameters that stay.

    Returns how many layers were replaced; one that stands in several places stays one layer.

    TypeError: a layer has something that its replacement would not have (see `check_plain`), or
    shares a parameter with another one; or a module owns parameters and is neither a key nor one of
    the types in `keep`, so that it would stay as it is without anyone noticing.
    """
    known = ", ".join(kind.__name__ for kind in (*replacements, *keep))
    unknown = f"this conversion does not know; it knows {known}"
    if owns_parameters(net) and not isinstance(net, (*replacements, *keep)):
        refuse_unknown("the network", net, unknown)
    check_unshared(net, replacements)
    made: dict[nn.Module, nn.Module] = {}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for name, parent in net.named_modules():
        for child_name, child in parent._modules.items():
            if child is None:
                continue
            path = f"{name}.{child_name}" if name else child_name
            if type(child) in replacements:
                check_plain(path, child, parameters=("weight", "bias"))
                _check_no_gradient_hooks(path, child)
                if child not in made:
                    made[child] = _made(path, replacements[type(child)], child)
                places.append((parent, child_name, made[child]))
            elif owns_parameters(child) and not isinstance(child, keep):
                refuse_unknown(path, child, unknown)
    for parent, child_name, module in places:
        setattr(parent, child_name, module)
    return len(made)


def check_plain(
    path: str,
    layer: nn.Module,
    parameters: Collection[str] = (),
    buffers: Collection[str] = (),
) -> None:
    """Raise a TypeError if a layer has more than its type, these parameters and buffers.

    A conversion takes those out of it. Spectral norm, weight norm and pruning in their older form
    compute the weight in a hook, from parameters of other names; hooks and functions of the user
    would be lost.
    """
    if any(param is not None and is_lazy(param) for param in layer._parameters.values()):
        refuse_unknown(path, layer, "has no sizes yet")
    lacking = [name for name in parameters if not _has(layer, name)]
    # Old weight norm, or a function of the user, puts a plain tensor where a parameter was.
    plain = [name for name, value in vars(layer).items() if isinstance(value, Tensor)]
    others = [
        *sorted(layer._parameters.keys() - set(parameters)),
        *(f"buffer {name}" for name in layer._buffers if name not in buffers),
        *(f"plain tensor {name}" for name in plain),
    ]
    if lacking or others:
        found = ", ".join(others) or "no " + ", ".join(lacking)
        raise TypeError(
            f"{path} is a {type(layer).__name__} with {found}, which a conversion would lose; "
            "where spectral norm, weight norm or pruning made that, call "
            "torch.nn.utils.remove_spectral_norm, remove_weight_norm or prune.remove on it first"
        )
    for name, param in layer._parameters.items():
        if param is not None and not param.is_floating_point():
            raise TypeError(
                f"{path}.{name} is of type {param.dtype}, which no conversion takes; use float32"
            )
    if layer._modules:
        raise TypeError(
            f"{path} is a {type(layer).__name__} with modules of its own "
            f"({', '.join(layer._modules)}), which a conversion would lose; put them beside it"
        )
    check_no_hooks(path, layer)


def check_no_hooks(path: str, module: nn.Module) -> None:
    """Raise a TypeError if a module that a conversion replaces has hooks."""
    hooks = [kind for kind in HOOKS if getattr(module, f"_{kind}")]
    hooks += ["a forward of its own"] if "forward" in vars(module) else []
    if hooks:
        raise TypeError(
            f"{path} has {', '.join(hooks).replace('_', ' ')}, which a conversion would lose; "
            "remove that before, and add it to what the conversion makes"
        )


def check_no_loose_tensors(net: nn.Module) -> None:
    """Raise a TypeError if a module holds a tensor that is no parameter and no buffer.

    Copies of a network would lack it, or could not be made.
    """
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                owner = f"{path}.{name}" if path else name
                raise TypeError(
                    f"{owner} is a tensor and no parameter or buffer, as spectral norm, weight "
                    "norm and pruning leave it in their older form; use "
                    "torch.nn.utils.parametrizations, or register_buffer for your own"
                )


def check_unshared(net: nn.Module, kinds: Collection[type[nn.Module]]) -> None:
    """Raise a TypeError if a layer of these types shares memory with another tensor.

    After a conversion each would have its own.
    """
    for first, second in shared(net):
        if type(first.module) in kinds or type(second.module) in kinds:
            are = "are one parameter" if is_one(first, second) else "lie in the same memory"
            raise TypeError(
                f"{first.name} and {second.name} {are}, and a conversion would make two of "
                "it; give each layer its own, or call one layer twice"
            )


def check_copied_as_one(net: nn.Module) -> None:
    """Raise a TypeError if different parameters share memory, which copies would not.

    One parameter under two names stays one.
    """
    for first, second in shared(net):
        if first.tensor is not second.tensor:
            raise TypeError(
                f"{first.name} and {second.name} lie in the same memory, and copies of the "
                "network would have two of it; give each module its own, or both the same "
                "nn.Parameter"
            )


def owns_parameters(module: nn.Module) -> bool:
    """Return whether a module has parameters of its own, outside of its children."""
    return parametrize.is_parametrized(module) or any(
        True for _ in module.parameters(recurse=False)
    )


def refuse_unknown(path: str, module: nn.Module, reason: str) -> None:
    """Raise a TypeError for a module that a conversion does not support, with a remedy."""
    if parametrize.is_parametrized(module):
        remedy = "; call torch.nn.utils.parametrize.remove_parametrizations on it first"
    elif any(is_lazy(param) for param in module.parameters(recurse=False)):
        remedy = "; pass a batch through the network first, which gives its layers their sizes"
    else:
        remedy = ""
    raise TypeError(f"{path} is a {type(module).__name__}, which {reason}{remedy}")


def _has(layer: nn.Module, parameter: str) -> bool:
    """Whether a layer has a parameter; its bias, and both of a batch norm, may be None."""
    may_be_none = parameter == "bias" or isinstance(layer, nn.BatchNorm2d)
    return layer._parameters.get(parameter) is not None or (
        may_be_none and parameter in layer._parameters
    )


def _check_no_gradient_hooks(path: str, layer: nn.Module) -> None:
    """TypeError where a parameter has hooks, which the parameter made of it would not have."""
    for name, param in layer.named_parameters(recurse=False):
        if param._backward_hooks or param._post_accumulate_grad_hooks:
            raise TypeError(
                f"{path}.{name} has gradient hooks, which a conversion would lose; register them "
                "on the parameters that the conversion makes"
            )


def _made(path: str, make: Callable[..., nn.Module], layer: nn.Module) -> nn.Module:
    try:
        return make(layer).train(layer.training)
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from error
