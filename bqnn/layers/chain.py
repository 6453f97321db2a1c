"""Networks whose children are called one after the other."""

from torch import nn


def is_chain(module: nn.Module) -> bool:
    """Whether a module is a Sequential that calls its children in order, and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
