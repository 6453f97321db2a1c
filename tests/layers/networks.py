"""Small networks of every method, to compile and to export."""

from contextvars import ContextVar

import pytest
import torch
from torch import Tensor, nn

from bqnn.layers.bayes import to_bayes
from bqnn.layers.dropout import to_mcdropout
from bqnn.layers.ensemble import Ensemble
from bqnn.nets import MLP, LeNet, ResNet

METHODS = ("pointwise", "bbb", "mcdropout", "sghmc")
RANDOM = ("bbb", "mcdropout")
NETS = ("mlp", "lenet", "resnet")
NUM_MEMBERS = 10  # more than torch compiles one function for
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.slow),  # compiles C++ for a minute
]
COMPILED_NETS = [
    ("lenet", "eager"),
    *((net, "aot_eager") for net in NETS),
    *(pytest.param(net, "inductor", marks=pytest.mark.slow) for net in NETS),
]
IMAGES = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)


def _traces_context_variables() -> bool:
    """Whether this torch can compile a read of a ContextVar, as random layers do."""
    variable: ContextVar[int] = ContextVar("variable", default=1)
    try:
        torch.compile(lambda x: x + variable.get(), backend="eager", fullgraph=True)(torch.ones(1))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


TRACES_RANDOM = pytest.mark.skipif(
    not _traces_context_variables(),
    reason="torch.compile of this torch cannot trace ContextVar.get (2.9 cannot, 2.14 can)",
)
COMPILED_METHODS = [
    pytest.param(method, marks=[TRACES_RANDOM] if method in RANDOM else []) for method in METHODS
]
EXPORTED = [  # whether torch.export is strict, and the method
    pytest.param(strict, method, marks=[TRACES_RANDOM] if strict and method == "bbb" else [])
    for strict in (False, True)
    for method in METHODS
]


def make(method: str, net: str = "lenet") -> nn.Module:
    torch.manual_seed(0)
    made = _network(net)
    if method == "bbb":
        return to_bayes(made, prior_std=1.0, init_rho=-3.0)
    if method == "mcdropout":
        return to_mcdropout(made, rate=0.3)
    if method == "sghmc":
        made = Ensemble(made, NUM_MEMBERS)
        for _ in range(NUM_MEMBERS):
            for param in made.current.parameters():
                param.data.add_(0.1 * torch.randn_like(param))
            made.collect()
    return made


def _network(name: str) -> nn.Module:
    if name == "mlp":
        return MLP([1, 8, 8], [3], hidden_features=[16, 16])
    if name == "resnet":
        return ResNet([1, 8, 8], [3], width=4, blocks_per_stage=[1, 1])
    return LeNet([1, 8, 8], [3], channels=[4, 6], hidden_features=16)


def gradients(net: nn.Module, run: nn.Module) -> list[Tensor]:
    """The gradients of the parameters of a network, by a pass through `run`."""
    torch.manual_seed(1)
    net.zero_grad()
    run(IMAGES).square().sum().backward()
    return [param.grad for param in net.parameters() if param.grad is not None]
