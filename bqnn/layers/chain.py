"""Detection of networks that call their children in order."""

from torch import fx, nn


def has_own_call(module: nn.Module) -> bool:
    """Return whether calling a module does something else than its class's `forward`.

    Hooks do not count.
    """
    own = type(module).__call__ is not nn.Module.__call__
    return "forward" in vars(module) or (own and not isinstance(module, fx.GraphModule))


def is_chain(module: nn.Module) -> bool:
    """Return whether a module is a Sequential with the `forward` of nn.Sequential.

    Examples:
        >>> is_chain(nn.Sequential(nn.ReLU())), is_chain(nn.ReLU())
        (True, False)
    """
    is_plain = isinstance(module, nn.Sequential) and not has_own_call(module)
    return is_plain and type(module).forward is nn.Sequential.forward
