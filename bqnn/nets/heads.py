"""The output layer of every network."""

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
        self.heads = nn.ModuleList(nn.Linear(in_features, size, bias=bias) for size in heads)
        self.leave = Leave()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.leave(head(x)) for head in self.heads], dim=1)
