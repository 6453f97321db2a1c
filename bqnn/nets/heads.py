"""Heads: the output layer of all networks."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bqnn.layers.markers import Leave


class Heads(nn.Module):
    """Parallel linear layers, one per head: [B, in_features] -> [B, sum(heads)].

    A classifier has one head with one output per class. A regression network has two heads with
    one output each, mean and log variance, so that quantization gives each its own range.

    Args:
        in_features: The number of inputs.
        heads: The number of outputs of each head.
        bias: Whether the linear layers have a bias.

    Examples:
        >>> Heads(100, heads=[1, 1], bias=True)(torch.zeros(4, 100)).shape
        torch.Size([4, 2])
    """

    def __init__(self, in_features: int, heads: Sequence[int], bias: bool) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                OrderedDict(linear=nn.Linear(in_features, size, bias=bias), leave=Leave())
            )
            for size in heads
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], dim=1)
