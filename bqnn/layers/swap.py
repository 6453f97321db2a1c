"""Replace layers of a network by type."""

from collections.abc import Callable, Mapping

from torch import nn


def swap(
    net: nn.Module,
    replacements: Mapping[type[nn.Module], Callable[..., nn.Module]],
    *,
    keep: tuple[type[nn.Module], ...] = (),
) -> int:
    """Replace every layer whose exact type is a key by what its value makes of it, in place.

    Returns how many layers were replaced; one that stands in several places stays one layer. One
    that owns parameters and is neither a key
    nor one of the types in `keep` is a TypeError: it would stay as it is without anyone
    noticing.
    """
    made: dict[nn.Module, nn.Module] = {}
    for name, parent in list(net.named_modules()):
        for child_name, child in list(parent._modules.items()):
            if child is None:
                continue
            if type(child) in replacements:
                if child not in made:
                    made[child] = replacements[type(child)](child)
                setattr(parent, child_name, made[child])
            elif any(True for _ in child.parameters(recurse=False)) and not isinstance(child, keep):
                path = f"{name}.{child_name}" if name else child_name
                known = ", ".join(kind.__name__ for kind in (*replacements, *keep))
                raise TypeError(
                    f"{path} is a {type(child).__name__}, which this conversion does not know; "
                    f"it knows {known}"
                )
    return len(made)
