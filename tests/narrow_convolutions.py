"""Networks with strided 1x1 convolutions of few channels, for which oneDNN is unsafe.

The script checks that the gradients of every method on them equal those of a float64 network.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bqnn.inference.likelihoods import Classification
from bqnn.layers.markers import DropoutSite
from bqnn.layers.noise import reseed
from bqnn.methods import METHODS, Method
from bqnn.nets import ResNet
from tests.small_methods import made

SIZE = 32
OPTIONS: dict[str, dict[str, Any]] = {
    "pointwise": {},
    "bbb": {"prior_std": 1.0, "init_rho": -80.0, "beta": 0.5},  # without noise
    "mcdropout": {"rate": 0.2, "drop_before_output": True},
    "sghmc": {"burn_in": 0, "collect_every": 1, "num_members": 2, "schedule": "constant"},
    "ensemble": {"num_members": 2},
    "swag": {"swa_start": 0.0, "swa_lr": 1e-3},
    "laplace": {"prior": 0.1},
}


class FunctionalConvolutions(nn.Module):
    """Functional convolutions: 2-D, 1-D on channels in the last dimension, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(5, 3, 1, 1))
        self.line = nn.Parameter(torch.randn(3, 5, 1))
        self.up = nn.Parameter(torch.randn(3, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.flat, stride=(1, 2)).flatten(2)
        line = F.conv1d(x.transpose(1, 2).contiguous().transpose(1, 2), self.line, stride=[2])
        square = line.reshape(len(x), 3, SIZE // 2, SIZE // 2)
        square = square.to(memory_format=torch.channels_last)
        return F.conv_transpose2d(square, self.up, stride=2, output_padding=1)


class DerivedKernel(nn.Module):
    """A convolution whose kernel is the weight of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.linear.weight[:, :, None, None], self.linear.bias, stride=2)


class Operators(nn.Module):
    """Convolutions that are neither layers nor functions of torch.nn.functional."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(5, 3, 1, 1))
        self.deep = nn.Parameter(torch.randn(3, 5, 1, 1))
        self.up = nn.Parameter(torch.randn(3, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.aten.conv2d(x, self.flat, None, [1, 2])
        x = torch.convolution(x, self.deep, None, (2, 1), (0, 0), (1, 1), False, (0, 0), 1)
        up = torch.ops.aten.convolution.default
        return up(x, self.up, None, [2, 2], [0, 0], [1, 1], True, [1, 1], 1)


class Checkpointed(nn.Module):
    """A layer with activation checkpointing, in both ways of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 1, stride=2)
        self.second = nn.Conv2d(5, 7, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.first, x, use_reentrant=False)
        return checkpoint(self.second, x, use_reentrant=True)


class Mapped(nn.Module):
    """A convolution of one image, mapped over the batch by torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda image: self.conv(image[None])[0])(x)


def narrow_resnet() -> nn.Module:
    """Create a ResNet whose shortcuts have 3 and 6 channels."""
    return ResNet([3, SIZE, SIZE], [4], width=3, blocks_per_stage=(1, 1, 1))


def odd_geometries() -> nn.Module:
    """Create 1x1 convolutions with various strides, with and without a bias."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 1, stride=2),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        DropoutSite(),
        nn.Conv2d(7, 1, 1, stride=(1, 2), bias=False),
        nn.Conv2d(1, 5, 1, stride=(2, 1), padding="valid"),
        nn.ReLU(),
        nn.Conv2d(5, 15, 1, stride=3),
        nn.Flatten(),
        nn.Linear(15 * 3 * 3, 4),
    )


def functional() -> nn.Module:
    """Create convolutions that are not layers."""
    return nn.Sequential(
        FunctionalConvolutions(), nn.ReLU(), DropoutSite(), nn.Flatten(), nn.Linear(2 * SIZE**2, 4)
    )


def derived() -> nn.Module:
    """Create a kernel that is not a parameter."""
    return nn.Sequential(
        DerivedKernel(), nn.ReLU(), DropoutSite(), nn.Flatten(), nn.Linear(5 * (SIZE // 2) ** 2, 4)
    )


def operators() -> nn.Module:
    """Create direct calls of torch's operators."""
    return nn.Sequential(
        Operators(), nn.ReLU(), DropoutSite(), nn.Flatten(), nn.Linear(2 * SIZE**2, 4)
    )


def checkpointed() -> nn.Module:
    """Create layers with activation checkpointing."""
    return nn.Sequential(
        Checkpointed(), nn.ReLU(), DropoutSite(), nn.Flatten(), nn.Linear(7 * (SIZE // 4) ** 2, 4)
    )


def mapped() -> nn.Module:
    """Create a layer in torch.func."""
    return nn.Sequential(
        Mapped(), nn.ReLU(), DropoutSite(), nn.Flatten(), nn.Linear(5 * (SIZE // 2) ** 2, 4)
    )


NETS: list[Callable[[], nn.Module]] = [
    narrow_resnet,
    odd_geometries,
    functional,
    derived,
    operators,
    checkpointed,
    mapped,
]
# A Bayesian network has no parameters but those of known layers; their random numbers cannot be
# mapped, and what is computed jointly is not there when a checkpoint computes its part again.
CASES = [
    (name, net)
    for name in METHODS
    for net in NETS
    # Gaussian weights are those of layers.
    if name not in ("bbb", "swag", "laplace") or net in (narrow_resnet, odd_geometries)
]


def method(name: str, net: Callable[[], nn.Module]) -> Method:
    """Create a method on one of the networks, for four classes."""
    torch.manual_seed(0)
    optimizer = {"name": "sghmc" if name == "sghmc" else "adam", "lr": 1e-3}
    options = {"num_train": 8, "seed": 0, "optimizer": optimizer, **OPTIONS[name]}
    return made(name, net(), Classification(["a", "b", "c", "d"]), **options)


def batch() -> tuple[Tensor, Tensor]:
    """Return eight images of four classes."""
    return torch.randn(8, 3, SIZE, SIZE), torch.arange(8) % 4


def loss(model: Method, x: Tensor, y: Tensor) -> Tensor:
    """Compute the loss of a training batch, with the same draws in each call."""
    reseed(torch.device("cpu"), 0)
    total = model.train().loss_terms(x, y)["loss"]
    assert isinstance(total, Tensor)
    return total


def check(name: str, net: Callable[[], nn.Module], steps: int) -> None:
    """Compare the gradients of some training batches with those of a float64 network."""
    model = method(name, net)
    exact = copy.deepcopy(model).double()
    for _ in range(steps):
        x, y = batch()
        loss(model, x, y).backward()
        loss(exact, x.double(), y).backward()
        pairs = zip(model.named_parameters(), exact.parameters(), strict=True)
        for (param_name, param), wanted in pairs:
            if wanted.grad is not None:
                scale = wanted.grad.abs().max()
                error = (param.grad.double() - wanted.grad).abs().max()
                assert error <= 1e-4 * scale + 1e-6, f"{name} {net.__name__} {param_name}: {error}"
        model.zero_grad()
        exact.zero_grad()


if __name__ == "__main__":
    for case in CASES:
        check(*case, steps=10)
        print(case[0], case[1].__name__, "trains right", flush=True)
