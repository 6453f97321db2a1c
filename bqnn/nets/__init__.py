"""Network architectures, each written once, in plain torch.nn and markers."""

from collections.abc import Callable

from torch import nn

from bqnn.nets.lenet import LeNet
from bqnn.nets.mlp import MLP
from bqnn.nets.resnet import ResNet

NETS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "lenet": LeNet, "resnet": ResNet}
