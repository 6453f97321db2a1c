"""The output layer of every network."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bqnn.layers.markers import Leave


class Heads(nn.Module):
    """One linear layer per head, side by side: [B, in_features] -> [B, sum(heads)].

    A classifier has one head with an output per class; a regressor has two with one output
    each, the mean and the log variance, which quantization gives a range of their own.
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
