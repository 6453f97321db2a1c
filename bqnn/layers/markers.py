"""Marker modules that conversions look for in a network."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DropoutSite(nn.Identity):
    """A place for MC dropout; the identity for every other method.

    Args:
        before_output: Marks the site before the output layer, which has its own option.

    Examples:
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


class Quantized(nn.Module):
    """Base class of modules that only quantized networks have, simulated or in int8."""


class Add(nn.Module):
    """Residual sum, with ReLU: relu(x + y).

    Args:
        relu: False leaves the ReLU out.

    Examples:
        >>> Add()(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 1.0]))
        tensor([2., 0.])
    """

    def __init__(self, relu: bool = True) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x + y) if self.relu else x + y

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


class Pool(nn.Module):
    """Global average pooling: [B, C, H, W] -> [B, C].

    Examples:
        >>> Pool()(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class AvgPool(nn.Module):
    """Average pooling with any windows: [B, C, H, W] -> [B, C, H', W'].

    Args:
        pool: The pooling, such as nn.AvgPool2d or nn.AdaptiveAvgPool2d.

    Examples:
        >>> AvgPool(nn.AvgPool2d(2))(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(x)
        return out


class SpatialMean(nn.Module):
    """The mean over an image, as `x.mean((2, 3))`: [B, C, H, W] -> [B, C].

    Args:
        keepdim: Whether the output is [B, C, 1, 1].

    Examples:
        >>> SpatialMean()(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(self, keepdim: bool = False) -> None:
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=self.keepdim)


class Cat(nn.Module):
    """Concatenation of activations.

    Args:
        dim: The dimension.

    Examples:
        >>> Cat(1)(torch.ones(2, 3), torch.ones(2, 4)).shape
        torch.Size([2, 7])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
