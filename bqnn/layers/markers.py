"""Marker modules that conversions look for in a network."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DropoutSite(nn.Identity):
    """A place for MC dropout; the identity for every other method.

    Args:
        before_output: Marks the site before the output layer, which has its own option.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), DropoutSite(), nn.Linear(4, 2))
        >>> net(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, before_output: bool = False) -> None:
        super().__init__()
        self.before_output = before_output


class Enter(nn.Identity):
    """The entry of the integer region of a quantized network; the identity in float."""


class Leave(nn.Identity):
    """The exit of the integer region of a quantized network; the identity in float."""


class Add(nn.Module):
    """Residual sum with ReLU: relu(x + y).

    Example:
        >>> Add()(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 1.0]))
        tensor([2., 0.])
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x + y)


class Pool(nn.Module):
    """Global average pooling: [B, C, H, W] -> [B, C].

    Example:
        >>> Pool()(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
