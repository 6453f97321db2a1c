"""The three networks pass the contract of networks."""

from collections.abc import Sequence

from torch import nn

from bqnn.nets import MLP, LeNet, ResNet
from bqnn.testing import NetContract


class TestMLP(NetContract):
    input_shapes = ((5,), (1, 4, 4))

    def make(self, input_shape: Sequence[int], heads: Sequence[int]) -> nn.Module:
        return MLP(input_shape, heads, hidden_features=[6, 7])


class TestLeNet(NetContract):
    input_shapes = ((1, 28, 28), (3, 4, 5), (1, 9, 15))

    def make(self, input_shape: Sequence[int], heads: Sequence[int]) -> nn.Module:
        return LeNet(input_shape, heads, channels=[4, 5], hidden_features=6)


class TestResNet(NetContract):
    input_shapes = ((3, 8, 8), (1, 13, 9))

    def make(self, input_shape: Sequence[int], heads: Sequence[int]) -> nn.Module:
        return ResNet(input_shape, heads, width=4, blocks_per_stage=[1, 1])
