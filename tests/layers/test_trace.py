"""A trace shows the calls of a network, and leaves the network as it was."""

import pytest
import torch
from torch import Tensor, nn

from bqnn.layers.markers import Enter
from bqnn.layers.trace import UntraceableError, caller_of, function_of, is_tensor, trace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 4), Enter())

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if mask is not None:
            x = x * mask
        y = self.block(x)
        y += scale
        return y.view(len(x), -1)


def test_calls_are_shown_with_their_callers() -> None:
    graph = trace(Net())
    calls = {node.name: node for node in graph.nodes if node.op.startswith("call_")}
    assert {"block_0", "block_1", "iadd", "size", "view"} <= calls.keys()
    assert caller_of(calls["block_0"]) == "block"
    assert caller_of(calls["view"]) == ""
    assert function_of(calls["view"]) is Tensor.view
    assert is_tensor(calls["iadd"])
    assert not is_tensor(calls["size"])
    assert "mul" not in calls


def test_a_trace_changes_nothing() -> None:
    net = Net()
    net.block.eval()
    state = torch.get_rng_state()
    trace(net, training=True)
    assert net.training
    assert not net.block.training
    assert torch.equal(torch.get_rng_state(), state)
    assert "len" not in globals()


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(3)


@pytest.mark.parametrize(
    ("module", "reason"), [(Branch(), "control flow"), (Noise(), "random numbers")]
)
def test_what_cannot_be_traced_is_named(module: nn.Module, reason: str) -> None:
    net = nn.Sequential(nn.ReLU(), module)
    with pytest.raises(UntraceableError, match=reason) as error:
        trace(net)
    assert "\n" not in str(error.value)
    assert error.value.module in ("", "1")  # who draws noise does not show
    assert [node.name for node in trace(net, leaves=[module]).nodes][1:] == ["_0", "_1", "output"]
