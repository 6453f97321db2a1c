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


class Remembering(nn.Module):
    """A network whose forward changes its attributes."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.calls, self.seen = 0, list[Tensor]()
        self.register_buffer("count", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.last = self.layer(x)
        self.seen.append(self.last)
        return self.last


def test_attributes_that_a_forward_changes_stay() -> None:
    net = Remembering()
    trace(net)
    assert (net.calls, net.last, net.seen, float(net.count)) == (0, None, [], 0)
    net(torch.ones(1, 3))  # now it holds tensors with gradients, which cannot be copied
    trace(net)
    assert net.calls == len(net.seen) == float(net.count) == 1


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: object) -> "Uncopied":
        raise RuntimeError("no copies")


def test_a_network_that_cannot_be_copied_is_refused() -> None:
    with pytest.raises(UntraceableError, match="cannot be copied: no copies"):
        trace(nn.Sequential(Uncopied(3, 2)))


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
