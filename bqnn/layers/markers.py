"""Marker modules, which conversions look for in a network."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DropoutSite(nn.Identity):
    """A site of MC dropout; the identity for every other method.

    `before_output` marks the site before the output layer, which has its own option.
    """

    def __init__(self, before_output: bool = False) -> None:
        super().__init__()
        self.before_output = before_output


class Enter(nn.Identity):
    """The entry of a quantized network's integer region."""


class Leave(nn.Identity):
    """The exit of a quantized network's integer region."""


class Add(nn.Module):
    """The residual sum, followed by a ReLU."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x + y)


class Pool(nn.Module):
    """Average over all of the image's height and width: [B, C, H, W] -> [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
