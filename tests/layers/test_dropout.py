"""Monte-Carlo dropout: which values are dropped, the scale of the others, and the places."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bqnn.layers.dropout import MCDropout, given_masks, to_mcdropout
from bqnn.layers.markers import DropoutSite
from bqnn.nets import MLP, LeNet, ResNet
from bqnn.quant.engines.contract import ActivationGrid
from bqnn.quant.engines.reference import Reference
from bqnn.quant.grids import Grid, OnGrid, plain
from bqnn.quant.integer import IntegerDropout
from bqnn.quant.simulated import SimulatedDropout


def dropouts(net: nn.Module) -> list[MCDropout]:
    return [module for module in net.modules() if isinstance(module, MCDropout)]


def kinds_in_order(net: nn.Module) -> list[type[nn.Module]]:
    """Return dropouts and weight layers in the order in which the network calls them."""
    called: list[type[nn.Module]] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: called.append(type(module)))
        for module in net.modules()
        if isinstance(module, MCDropout | nn.Conv2d | nn.Linear)
    ]
    net.eval()(torch.zeros(2, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    return called


def test_given_masks_are_used_in_their_order_and_only_inside_the_context():
    net = nn.Sequential(MCDropout(0.5), nn.Identity(), MCDropout(0.5)).eval()
    first, second = torch.tensor([[True, True, False]]), torch.tensor([[True, False, True]])
    with pytest.raises(StopIteration), given_masks(net, [first, second]):
        assert net(torch.ones(1, 3)).tolist() == [[4, 0, 0]]
        net(torch.ones(1, 3))  # there are no more
    torch.manual_seed(0)
    assert not torch.equal(net(torch.ones(1, 99)), net(torch.ones(1, 99)))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_kept_values_are_scaled_so_that_the_mean_is_preserved(rate):
    torch.manual_seed(0)
    out = MCDropout(rate)(torch.full((500, 200), 3.0))
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 3 / (1 - rate)))
    # 5 standard errors of a Bernoulli mean over 100,000 values
    assert abs(kept.float().mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / out.numel())


def test_whole_channels_of_an_image_are_dropped_and_each_row_has_its_own_mask():
    torch.manual_seed(0)
    out = MCDropout(0.5)(torch.ones(64, 32, 3, 5))
    channels = out.flatten(2)
    assert torch.equal(channels, channels[..., :1].expand_as(channels))
    masks = channels[..., 0] != 0
    # chance agreement of two fair masks is 1/2, over 63 * 32 pairs of neighbours
    agreement = (masks[1:] == masks[:-1]).float().mean()
    assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(63 * 32)
    assert len(masks.unique(dim=0)) == 64


def test_single_features_of_a_table_are_dropped():
    torch.manual_seed(0)
    masks = MCDropout(0.5)(torch.ones(64, 32)) != 0
    for share in (masks.float().mean(0), masks.float().mean(1)):
        assert (share > 0).all()
        assert (share < 1).all()


def test_layout_and_dtype_are_kept():
    x = torch.ones(2, 3, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    out = MCDropout(0.5)(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == torch.bfloat16


def test_gradients_flow_only_through_kept_values():
    torch.manual_seed(0)
    x = torch.ones(10, 10, requires_grad=True)
    out = MCDropout(0.75)(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, out)
    assert set(gradient.unique().tolist()) == {0, 4}


@pytest.mark.parametrize("training", [True, False])
def test_every_call_drops_anew_in_both_modes(training):
    torch.manual_seed(0)
    x = torch.ones(20, 20)
    dropout = MCDropout(0.5).train(training)
    assert not torch.equal(dropout(x), dropout(x))


@pytest.mark.parametrize("rate", [1e-300, 1e-12, 1e-6, 2**-17, 0.999999, 1 - 2**-53])
@pytest.mark.parametrize("training", [True, False])
def test_rates_near_zero_and_one_drop_next_to_nothing_and_next_to_all(rate, training):
    torch.manual_seed(0)
    num_values = 2**20
    out = MCDropout(rate).train(training)(torch.ones(num_values // 64, 64, dtype=torch.float64))
    kept = out[out != 0]
    expected = num_values * min(rate, 1 - rate)
    rare = num_values - len(kept) if rate < 0.5 else len(kept)
    assert abs(rare - expected) < 5 * math.sqrt(expected) + 1
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))


@pytest.mark.parametrize("rate", [1e-9, 1e-6, 0.5, 0.999999])
def test_dropout_of_integers_drops_by_the_same_rate(rate):
    x = torch.ones(2**14, 64)
    dropout = SimulatedDropout(rate).eval()
    torch.manual_seed(0)
    simulated = dropout(OnGrid.of(x, Grid(1.0, 0, 127)))
    torch.manual_seed(0)
    engine = Reference()
    integers = IntegerDropout(dropout, engine)(engine.quantize(x, ActivationGrid(1.0, 0, 255)))
    torch.testing.assert_close(engine.dequantize(integers), plain(simulated))
    expected = x.numel() * rate
    dropped = int((engine.integers(integers) == 0).sum())
    assert abs(dropped - expected) < 5 * math.sqrt(expected * (1 - rate)) + 1


def test_rate_zero_is_the_identity():
    x = torch.randn(4, 4)
    assert torch.equal(MCDropout(0)(x), x)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_a_rate_outside_its_range_is_refused(rate):
    with pytest.raises(ValueError, match=f"rate={rate}"):
        MCDropout(rate)


def test_draws_in_evaluation_differ_and_leave_batch_norm_as_it_was():
    torch.manual_seed(0)
    net = to_mcdropout(ResNet([3, 8, 8], [4], width=4), rate=0.3).eval()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    x = torch.randn(5, 3, 8, 8)
    assert not torch.equal(net(x), net(x))
    assert len(before) == 3 * 20  # mean, variance and count of 20 batch norms
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize(
    ("net", "num_sites"),
    [
        pytest.param(lambda: MLP([13], [1, 1]), 3, id="mlp"),
        pytest.param(lambda: LeNet([1, 28, 28], [10]), 3, id="lenet"),
        pytest.param(lambda: ResNet([3, 32, 32], [10], width=4), 20, id="resnet"),
    ],
)
def test_every_site_drops_and_the_one_before_the_output_has_a_switch(net, num_sites):
    everywhere = to_mcdropout(net(), rate=0.25)
    assert [dropout.rate for dropout in dropouts(everywhere)] == [0.25] * num_sites
    assert isinstance(everywhere.site, MCDropout)

    inside = to_mcdropout(net(), rate=0.25, before_output=False)
    assert len(dropouts(inside)) == num_sites - 1
    assert isinstance(inside.site, DropoutSite)


@pytest.mark.parametrize("kind", [LeNet, ResNet])
def test_a_dropout_precedes_every_weight_layer_except_the_first(kind):
    called = kinds_in_order(to_mcdropout(kind([3, 16, 16], [4]), rate=0.5))
    assert called[0] is nn.Conv2d
    rest = called[1:]
    assert all(module is MCDropout for module in rest[::2])
    assert not any(module is MCDropout for module in rest[1::2])
    assert rest[-1] is nn.Linear


def test_a_network_without_sites_is_refused():
    with pytest.raises(ValueError, match="no DropoutSite"):
        to_mcdropout(nn.Sequential(nn.Linear(2, 2)), rate=0.5)
    net = to_mcdropout(MLP([2], [1]), rate=0.5)
    with pytest.raises(ValueError, match="no DropoutSite"):
        to_mcdropout(net, rate=0.5)


class Dropping(nn.Module):
    """Dropout layers of torch at different places, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.channels = nn.Dropout(0.3), nn.Dropout2d(0.4)
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.drop(self.channels(self.conv(self.drop(x))))
        return self.head(x.mean((2, 3)))


def test_dropout_layers_of_torch_keep_their_rates_or_get_one():
    net = to_mcdropout(Dropping()).eval()
    assert [(made.rate, made.dims) for made in dropouts(net)] == [(0.3, 0), (0.4, 2)]
    x = torch.randn(5, 3, 8, 8)
    assert not torch.equal(net(x), net(x))
    assert {made.rate for made in dropouts(to_mcdropout(Dropping(), rate=0.1))} == {0.1}


@pytest.mark.parametrize(
    ("layer", "shape", "together"),
    [
        (nn.Dropout(0.5), (8, 16, 5, 6), ()),
        (nn.Dropout(0.5), (8, 16), ()),
        (nn.Dropout1d(0.5), (8, 16, 6), (2,)),
        (nn.Dropout2d(0.5), (8, 16, 5, 6), (2, 3)),
        (nn.Dropout3d(0.5), (8, 16, 3, 5, 6), (2, 3, 4)),
    ],
    ids=str,
)
def test_what_a_layer_of_torch_drops_together_mc_dropout_drops_together(layer, shape, together):
    x = torch.ones(shape)
    made = to_mcdropout(nn.Sequential(layer))[0]
    for module in (layer, made.eval()):
        out = module(x)
        assert set(out.unique().tolist()) == {0, 2}
        if together:
            assert torch.equal(out.amax(together), out.amin(together))
        else:
            assert not torch.equal(out.amax(-1), out.amin(-1))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.AlphaDropout()), "0 is an AlphaDropout.*use Dropout,"),
        (nn.Sequential(nn.Dropout(1.0)), "rate=1"),
        (nn.Sequential(nn.Dropout(), nn.LSTM(2, 2, 2, dropout=0.1)), "1 is an LSTM with dropout"),
        (nn.Sequential(DropoutSite(), nn.Dropout()), "rate=None: 0 is a DropoutSite"),
    ],
)
def test_dropout_that_cannot_be_replaced_is_refused_by_name(net, message):
    kinds = [type(module) for module in net.modules()]
    with pytest.raises((TypeError, ValueError), match=message) as error:
        to_mcdropout(net)
    assert "\n" not in str(error.value)
    assert [type(module) for module in net.modules()] == kinds


def test_calls_of_dropout_are_refused_by_name():
    class Functional(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    with pytest.raises(TypeError, match=r"dropout, called by 1, .*nn\.Dropout"):
        to_mcdropout(nn.Sequential(nn.Dropout(0.1), Functional()))


def test_a_network_that_remembers_its_outputs_remembers_nothing_of_the_conversion():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.1), None

        def forward(self, x):
            self.last = self.drop(x)
            return self.last

    assert to_mcdropout(Net()).last is None
