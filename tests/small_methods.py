"""Each method on a small network, and its training rows."""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from bqnn.data.loader import TensorLoader
from bqnn.inference.likelihoods import Classification, Likelihood, Regression
from bqnn.methods import METHODS, Method
from bqnn.nets import MLP, LeNet

NUM_ROWS = 12
ADAM = {"name": "adam", "lr": 1e-2}
OPTIONS: dict[str, dict[str, Any]] = {
    "pointwise": {"num_samples": 1, "val_samples": 1, "optimizer": ADAM},
    "bbb": {"prior_std": 1.0, "init_rho": -3.0, "beta": 0.5, "optimizer": ADAM},
    "mcdropout": {"rate": 0.2, "drop_before_output": True, "optimizer": ADAM},
    "sghmc": {
        "burn_in": 0,
        "collect_every": 1,
        "num_members": 3,
        "schedule": "constant",
        "optimizer": {"name": "sghmc", "lr": 1e-3},
    },
    "swag": {"swa_lr": 1e-2, "swa_start": 0.0, "optimizer": {"name": "sgd", "lr": 1e-2}},
    "laplace": {"prior": "marginal_likelihood", "optimizer": ADAM},
    "ensemble": {"num_members": 3, "num_samples": 3, "optimizer": ADAM},
}


def images() -> TensorLoader:
    """Return 12 images of 1x8x8 in three classes, 4 to a batch."""
    torch.manual_seed(0)
    return TensorLoader(torch.randn(NUM_ROWS, 1, 8, 8), torch.arange(NUM_ROWS) % 3, batch_size=4)


def table() -> TensorLoader:
    """Return 12 rows of 3 numbers and a standardized target, 4 to a batch."""
    torch.manual_seed(0)
    return TensorLoader(torch.randn(NUM_ROWS, 3), torch.randn(NUM_ROWS), batch_size=4)


def lenet() -> nn.Module:
    torch.manual_seed(0)
    return LeNet([1, 8, 8], [3], channels=(2, 3), hidden_features=5)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP([3], [1, 1], hidden_features=[4])


def made(name: str, net: nn.Module, likelihood: Likelihood, **options: Any) -> Method:
    """Create a method. Members of an ensemble, and chains, have the network with other weights."""
    if name == "ensemble" or options.get("chain_epochs"):
        options["make_net"] = partial(with_other_weights, net)
    return METHODS[name](net, likelihood, **options)


def with_other_weights(net: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a network with new initial weights."""
    net = deepcopy(net)
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
            module.reset_parameters()
    return net


def image_method(name: str, net: nn.Module | None = None, **changes: Any) -> Method:
    """Create a method on LeNet and three classes."""
    options = {"num_train": NUM_ROWS, "seed": 0, **OPTIONS[name], **changes}
    return made(name, net or lenet(), Classification(["a", "b", "c"]), **options)


def table_method(name: str, **changes: Any) -> Method:
    """Create a method on an MLP and one target."""
    options = {"num_train": NUM_ROWS, "seed": 0, **OPTIONS[name], **changes}
    return made(name, mlp(), Regression(target_mean=0.0, target_std=1.0), **options)
