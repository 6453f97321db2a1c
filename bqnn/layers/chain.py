"""Detection of networks that call their children in order."""

from torch import nn


def is_chain(module: nn.Module) -> bool:
    """Return whether a module is a Sequential with the `forward` of nn.Sequential.

    Examples:
        >>> is_chain(nn.Sequential(nn.ReLU())), is_chain(nn.ReLU())
        (True, False)
    """
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
