"""Network architectures in plain torch.nn, with markers for conversions."""

from collections.abc import Callable

from torch import nn

from bqnn.nets.lenet import LeNet
from bqnn.nets.mlp import MLP
from bqnn.nets.resnet import ResNet

NETS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "lenet": LeNet, "resnet": ResNet}
