"""Layers whose outputs only a residual sum reads, and their postponed calls."""

import pytest
import torch
from torch import Tensor, nn

from bqnn.layers.markers import Add, Enter, Leave
from bqnn.nets import ResNet
from bqnn.quant.fuse import fuse
from bqnn.quant.grids import plain
from bqnn.quant.integer import convert
from bqnn.quant.postponed import Postponed, layers_before_sums
from bqnn.quant.quantize import prepare_qat
from bqnn.quant.simulated import calibrate, freeze, prepare, use_engine
from bqnn.quant.spec import QuantSpec
from tests.quant.engines.battery import SUMS, Sums

FOUND = {
    "layer and input": {"conv"},
    "input and layer, relu": {"conv"},
    "two layers": {"conv"},
    "two layers of other geometry": {"stride"},
    "sum of sums": {"conv", "point"},
    "a layer that others read": {"point"},
    "a layer that is added to itself": set(),
    "a layer that is called twice": set(),
    "relu of a layer": set(),
    "pool of a layer": {"stride"},
    "an input that changes in between": {"conv"},
    "an input that a module changes in between": set(),
    "linear": {"linear"},
}


@pytest.mark.parametrize("total", FOUND)
def test_layers_that_only_a_sum_reads_are_found(total: str) -> None:
    made = prepare_qat(Sums(SUMS[total]), QuantSpec(engine="reference"))
    found = {name for name, module in made.named_modules() if getattr(module, "feeds_sum", False)}
    assert found == FOUND[total]


def test_a_network_that_is_not_traced_by_mark_has_them_too() -> None:
    net = fuse(ResNet([3, 8, 8], [10], width=4, blocks_per_stage=[1, 1]))
    assert layers_before_sums(net) == {"blocks.0.residual.5", "blocks.1.residual.5"}


class Aside(nn.Module):
    """A network that reads a summand once more in training, or whose path depends on values."""

    def __init__(self, *, untraceable: bool) -> None:
        super().__init__()
        self.enter, self.leave, self.add = Enter(), Leave(), Add()
        self.first, self.second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.untraceable = untraceable

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.second(x)
        if self.untraceable and len(x.shape) != 4:
            raise ValueError("no images")
        if self.training:
            y = self.first(y)
        return self.leave(self.add(y, x))


@pytest.mark.parametrize("untraceable", [False, True])
def test_what_training_may_read_is_not_postponed(untraceable: bool) -> None:
    assert layers_before_sums(fuse(Aside(untraceable=untraceable))) == set()


@pytest.fixture
def prepared() -> nn.Module:
    torch.manual_seed(0)
    net = ResNet([3, 8, 8], [10], width=4, blocks_per_stage=[1, 1])
    return prepare(fuse(net), QuantSpec(engine="onednn", activation_observer="minmax"))


needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch lacks oneDNN"
)


@needs_onednn
def test_a_postponed_layer_learns_the_grid_that_other_engines_need(prepared: nn.Module) -> None:
    x = torch.randn(16, 3, 8, 8)
    prepared.train()(x).sum().backward()
    assert all(param.grad is not None and param.grad.any() for param in prepared.parameters())
    layer = prepared.get_submodule("blocks.0.residual.5")
    assert layer.is_postponed
    assert layer.output_quant.has_range
    freeze(prepared)
    grid = layer.output_quant.scale.clone()
    prepared(10 * x)
    assert torch.equal(layer.output_quant.scale, grid)
    use_engine(prepared, "reference")
    assert not layer.is_postponed
    assert convert(prepared.eval())(x).isfinite().all()


@needs_onednn
def test_the_sum_rounds_once(prepared: nn.Module) -> None:
    x = torch.randn(16, 3, 8, 8)
    calibrate(prepared, [x])
    outputs = {}
    for name in ("onednn", "reference"):
        use_engine(prepared, name)
        seen: list[Tensor] = []
        add = prepared.get_submodule("blocks.0.add")
        hook = add.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with torch.no_grad():
            prepared(x)
        hook.remove()
        outputs[name] = plain(seen[0])
    step = float(add.output_quant.scale)
    difference = (outputs["onednn"] - outputs["reference"]).abs().max()
    assert 0 < difference < 1.5 * step


@needs_onednn
def test_a_part_of_a_network_says_that_its_output_is_postponed(prepared: nn.Module) -> None:
    calibrate(prepared, [torch.randn(16, 3, 8, 8)])
    with torch.no_grad():
        out = prepared.get_submodule("blocks.0.residual")(prepared[0](torch.randn(2, 3, 8, 8)))
    assert isinstance(out, Postponed)
    assert out.shape == (2, 4, 8, 8)
    with pytest.raises(TypeError, match=r"exp cannot run in int8 .* of blocks.0.residual.5"):
        torch.exp(out)
