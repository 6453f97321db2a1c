"""Networks whose children are called one after the other."""

from torch import nn


def is_chain(module: nn.Module) -> bool:
    """Return whether a module is a Sequential that only calls its children in order."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
