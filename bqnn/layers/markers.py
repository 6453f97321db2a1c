"""Modules that compute nothing special in float and mark what a conversion must find."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DropoutSite(nn.Identity):
    """A place where MC dropout drops; the identity for every other method.

    `before_output` marks the site right before the output layer, which is a switch of its own.
    """

    def __init__(self, before_output: bool = False) -> None:
        super().__init__()
        self.before_output = before_output


class Enter(nn.Identity):
    """The float tensor that passes here enters the integer region of a quantized network."""


class Leave(nn.Identity):
    """The tensor that passes here leaves the integer region of a quantized network."""


class Add(nn.Module):
    """The residual sum, followed by a ReLU."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x + y)


class Pool(nn.Module):
    """Average over all of the image's height and width: [B, C, H, W] -> [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
