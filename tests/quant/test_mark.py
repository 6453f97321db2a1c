"""Networks of plain torch run in integers as simulated, or are refused before training."""

import copy
import pickle
from collections.abc import Callable
from copy import deepcopy
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bqnn.inference.predict import predictive
from bqnn.layers.bayes import to_bayes
from bqnn.layers.dropout import to_mcdropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.markers import Add, AvgPool, Cat, Enter, Leave
from bqnn.quant.fuse import Fused, fuse
from bqnn.quant.integer import IntegerLayer, convert
from bqnn.quant.mark import mark
from bqnn.quant.quantize import prepare_qat, quantize
from bqnn.quant.simulated import SimulatedLayer, calibrate, enable
from bqnn.quant.spec import QuantSpec
from bqnn.quant.traced import Traced

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SPEC = QuantSpec(activation_observer="minmax")
Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Layers for a given `forward`."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn, self.bn2 = made_norm(), made_norm()
        self.relu = nn.ReLU(inplace=True)
        self.relu6 = nn.ReLU6()
        self.pool = nn.AvgPool2d(3, 2, padding=1)
        self.drop = nn.Dropout(0.3)
        self.same = nn.Identity()
        self.head = nn.Linear(8, 4)
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def made_norm() -> nn.BatchNorm2d:
    """Create a batch norm that is far from the identity."""
    bn = nn.BatchNorm2d(8)
    nn.init.normal_(bn.weight, 1, 0.3)
    nn.init.normal_(bn.bias)
    nn.init.uniform_(bn.running_var, 0.5, 2)
    return bn


def head(net: Net, x: Tensor) -> Tensor:
    return net.head(x.mean((2, 3)))


def functional(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.first(x))
    x = F.max_pool2d(x, 2)
    x = F.relu(F.max_pool2d(F.dropout2d(net.second(x), 0.2, net.training), 2))
    x = F.dropout(x, training=net.training)
    x = F.avg_pool2d(x, 4)
    x = x.view(len(x), -1)
    return F.log_softmax(net.head(x), dim=1)


def residual(net: Net, x: Tensor) -> Tensor:
    x = net.relu(net.bn(net.first(x)))
    out = net.bn2(net.second(x))
    out += x
    return head(net, net.relu(out))


def sum_without_relu(net: Net, x: Tensor) -> Tensor:
    x = net.relu6(net.first(x))
    return head(net, net.second(x) + x)


def sums(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    y = torch.add(net.second(x), x).relu_()
    y = y.add_(net.grouped(x))
    return head(net, torch.relu(y + y) + net.deep(y) + x.clamp(min=0))


def concatenated(net: Net, x: Tensor) -> Tensor:
    x = F.relu6(net.bn(net.first(x)))
    parts = torch.cat([net.second(x), x, F.hardtanh(net.deep(x), 0, 6)], dim=1)
    left, middle, _ = parts.chunk(3, dim=1)
    return head(net, torch.cat((left, middle), 2))


def shuffled(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    rows, channels, height, width = x.size()
    x = x.view(rows, 2, channels // 2, height, width)
    x = torch.transpose(x, 1, 2).contiguous().view(rows, -1, height, width)
    return net.head(torch.flatten(F.adaptive_avg_pool2d(net.second(x), 1), 1))


def pooled(net: Net, x: Tensor) -> Tensor:
    x = net.pool(F.avg_pool2d(net.first(x), 3, 2, 1, True, False))
    x = F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(x, (7, 3)), (1, 2))
    return net.head(x.permute(0, 2, 3, 1)).flatten(1)


def preactivated(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    y = net.second(F.relu(net.bn(x)))
    return head(net, net.deep(net.bn2(x + y)) + x)


def layer_twice(net: Net, x: Tensor) -> Tensor:
    x = net.relu(net.first(x))
    x = net.relu(net.second(x))
    return head(net, net.second(x))


def last_layers_in_the_middle(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.first(x)).relu()
    return F.adaptive_avg_pool2d(net.relu(net.second(x)), 1).flatten(1)


def two_outputs(net: Net, x: Tensor) -> Tensor:
    x = net.first(x).relu()
    y = head(net, x)
    return torch.cat([y.sigmoid(), x.flatten(1), torch.tanh(net.deep(x)).flatten(1)], 1)


def entered_twice(net: Net, x: Tensor) -> Tensor:
    y = torch.tanh(x)
    return head(net, net.first(x) + net.first(y) + torch.cat([x, y, x], 1)[:, :8])


def changed_in_place(net: Net, x: Tensor) -> Tensor:
    y = net.first(x)
    z = net.relu(y)
    old = y
    y += net.second(z)
    return head(net, F.relu(torch.cat([y, z, old], 1), inplace=True)[:, 4:12])


def normalized(net: Net, x: Tensor) -> Tensor:
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.full((3, 1, 1), 0.2)
    return head(net, net.first((x - mean[:, None, None]) / std))


FORWARDS = [
    functional,
    residual,
    sum_without_relu,
    sums,
    concatenated,
    shuffled,
    pooled,
    preactivated,
    layer_twice,
    last_layers_in_the_middle,
    two_outputs,
    entered_twice,
    changed_in_place,
    normalized,
]
by_name = pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)


def assert_int8_is_simulated(simulated: nn.Module, x: Tensor = X) -> None:
    """Compare the outputs of several draws; `convert` compares every integer."""
    integer = convert(deepcopy(simulated), probe=x)
    assert any("Integer" in type(module).__name__ for module in integer.modules())
    simulated.eval()
    for seed in range(3):
        with torch.no_grad():
            torch.manual_seed(seed)
            expected = simulated(x)
            torch.manual_seed(seed)
            assert torch.equal(integer(x), expected)


@by_name
def test_int8_computes_the_simulated_integers(
    forward: Forward, caplog: pytest.LogCaptureFixture
) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        net = Net(forward).eval().to(memory_format=layout)
        simulated = calibrate(prepare_qat(net, SPEC), [X.to(memory_format=layout)])
        assert_int8_is_simulated(simulated, X.to(memory_format=layout))
    assert not caplog.records


@by_name
def test_a_marked_network_computes_the_same(forward: Forward) -> None:
    for training in (False, True):
        net = Net(forward).train(training)
        attributes = set(vars(net))
        marked = mark(net)
        assert set(vars(net)) == attributes
        assert marked.training is training
        for made in (marked, deepcopy(marked), fuse(deepcopy(marked))):
            torch.manual_seed(1)
            expected = deepcopy(net)(X)
            torch.manual_seed(1)
            assert torch.equal(made(X), expected)


@by_name
def test_without_rounding_a_simulated_network_computes_in_float(forward: Forward) -> None:
    net = Net(forward).eval()
    simulated = prepare_qat(net, SPEC)
    enable(simulated, False)
    torch.testing.assert_close(simulated(X), net(X), rtol=1e-4, atol=1e-5)


@by_name
@pytest.mark.parametrize("engine", ["x86", "onednn"])
def test_other_engines_compute_the_simulated_integers(forward: Forward, engine: str) -> None:
    spec = QuantSpec(activation_observer="minmax", engine=engine, weight_bits=5)
    assert_int8_is_simulated(calibrate(prepare_qat(Net(forward).eval(), spec), [X]))


def one_line(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 450
    return message


def branching(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    return head(net, x if x.sum() > 0 else -x)


def with_noise_in_training(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    return head(net, net.second(x) if net.training else x)


def functional_layer(net: Net, x: Tensor) -> Tensor:
    return head(net, F.conv2d(net.first(x), net.second.weight))


def always_dropping(net: Net, x: Tensor) -> Tensor:
    return head(net, F.dropout(net.first(x), 0.5))


def changing_a_part(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    y = x[:, :4]
    y += 1
    return head(net, x)


def changing_an_alias(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    shortcut = net.same(x)
    return head(net, net.second(net.relu(x)) + shortcut)


REFUSED: dict[str, tuple[Forward, str]] = {
    "sigmoid": (lambda net, x: head(net, net.first(x).sigmoid()), "sigmoid, called by the network"),
    "gelu": (lambda net, x: head(net, F.gelu(net.first(x))), "gelu, called by the network"),
    "scaled": (lambda net, x: head(net, net.first(x) * 2), "mul, called by"),
    "plus one": (lambda net, x: head(net, net.first(x) + 1), "add, called by"),
    "alpha": (
        lambda net, x: head(net, torch.add(net.first(x), net.first(x), alpha=2)),
        "add, called by",
    ),
    "stack": (lambda net, x: head(net, torch.stack([net.first(x)] * 2)[0]), "stack, called by"),
    "mean of channels": (
        lambda net, x: net.head(net.first(x).mean(1).flatten(1)[:, :8]),
        "mean, called by",
    ),
    "clamp": (lambda net, x: head(net, net.first(x).clamp(-1, 1)), "clamp, called by"),
    "interpolate": (lambda net, x: head(net, F.interpolate(net.first(x), 8)), "interpolate"),
    "always dropping": (always_dropping, "dropout, called by"),
    "relu6 of a pool": (
        lambda net, x: head(net, net.relu6(F.max_pool2d(net.first(x), 2))),
        "relu6, a ReLU6",
    ),
    "relu6 function of a pool": (
        lambda net, x: head(net, F.relu6(F.max_pool2d(net.first(x), 2))),
        "relu6, a ReLU6, cannot .*; move that part to a module .* directly after a layer",
    ),
    "random inputs": (
        lambda net, x: head(net, net.first(x + torch.randn_like(x))),
        "randn_like, called by the network itself, draws random numbers",
    ),
    "branch": (branching, "its control flow depends on .*the inputs.*keep"),
    "training": (with_noise_in_training, "something else in training .*second"),
    "functional layer": (functional_layer, "conv2d, called by the network itself, is a layer"),
    "part changed": (changing_a_part, "changes getitem in place, which is read later as first"),
    "alias changed": (changing_an_alias, "changes first in place, which is read later as same"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_integers_is_refused_by_name(name: str) -> None:
    forward, message = REFUSED[name]
    net = Net(forward)
    before = net.state_dict()
    with pytest.raises(TypeError, match=message) as error:
        prepare_qat(net)
    one_line(error.value)
    assert net.state_dict().keys() == before.keys()
    assert type(net.first) is nn.Conv2d


class Odd(nn.Conv2d):
    """A layer with its own forward, which integers would ignore."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv1d(3, 4, 1), "0 is a Conv1d"),
        (nn.ConvTranspose2d(3, 4, 1), "0 is a ConvTranspose2d"),
        (Odd(3, 4, 1), "0 is an Odd"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), "remove_parametrizations"),
        (nn.LazyConv2d(4, 1), "pass a batch through"),
        (nn.Conv2d(3, 4, 1, padding_mode="reflect"), "0: padding_mode"),
        (nn.Conv2d(3, 4, 2, padding="same"), "0: padding='same'"),
        (nn.utils.spectral_norm(nn.Conv2d(3, 4, 1)), "spectral"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_would_stay_in_float_are_refused(layer: nn.Module, message: str) -> None:
    net = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    for quantized in (lambda: quantize(net, [X]), lambda: prepare_qat(net)):
        with pytest.raises(TypeError, match=message) as error:
            quantized()
        one_line(error.value)


def test_hooks_that_would_be_lost_are_refused() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 2))
    for path in ("", "0", "0.0"):
        handle = net.get_submodule(path).register_forward_hook(lambda *_: None)
        with pytest.raises(TypeError, match=f"^{path or 'the network'} has forward hooks"):
            prepare_qat(net)
        handle.remove()
    prepare_qat(net)


class Doubling(nn.Sequential):
    def __call__(self, *inputs: Any) -> Any:
        return 2 * super().__call__(*inputs)


@pytest.mark.parametrize("place", ["the network", "0", "0.0"])
def test_a_call_that_would_be_lost_is_refused(place: str) -> None:
    net: nn.Module = Doubling(nn.Linear(3, 4))
    for _ in range(place.count("0")):
        net = nn.Sequential(net, nn.Linear(4, 4))
    with pytest.raises(TypeError, match=f"^{place} is a Doubling with its own __call__") as error:
        prepare_qat(net)
    one_line(error.value)


def test_networks_without_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="no linear layer or convolution"):
        quantize(nn.Sequential(nn.ReLU()), [X])
    with pytest.raises(TypeError, match="is a Linear itself; wrap it"):
        quantize(nn.Linear(3, 2), [X])


def test_a_network_with_its_own_markers_is_left_alone() -> None:
    net = nn.Sequential(Enter(), nn.Linear(3, 2), Leave())
    assert mark(net) is net
    with pytest.raises(ValueError, match="its own Enter"):
        mark(net, keep=("1",))


class Gate(nn.Module):
    """Squeeze and excitation, which has no integers and cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() == 0:
            return x
        scale = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()
        return x * scale[:, :, None, None]


@pytest.mark.parametrize("keep", [(Gate,), ("1.gate",), ("*.gate",)])
def test_kept_modules_stay_in_float(keep: tuple[type[nn.Module] | str, ...]) -> None:
    torch.manual_seed(0)
    block = nn.Sequential()
    block.add_module("gate", Gate())
    net = nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.Conv2d(8, 4, 3), nn.Flatten()).eval()
    with pytest.raises(TypeError, match=r"1\.gate, a Gate, cannot be traced.*keep=\('1\.gate',\)"):
        prepare_qat(net)
    simulated = calibrate(prepare_qat(net, SPEC, keep=keep), [X])
    assert type(simulated.get_submodule("1.gate").down) is nn.Linear
    assert_int8_is_simulated(simulated)


def test_first_and_last_layers_can_stay_in_float() -> None:
    net = Net(residual).eval()
    simulated = calibrate(prepare_qat(net, SPEC, keep=("first", "head", "bn")), [X])
    assert type(simulated.first) is nn.Conv2d
    assert type(simulated.head) is nn.Linear
    assert type(simulated.bn) is nn.BatchNorm2d
    assert isinstance(simulated.second, SimulatedLayer)
    assert_int8_is_simulated(simulated)
    with pytest.raises(ValueError, match="no linear layer or convolution"):
        prepare_qat(net, keep=(nn.Conv2d, nn.Linear))


@pytest.mark.parametrize("keep", [(3,), 3.0, (torch.tanh,)])
def test_keep_has_types_and_globs(keep: Any) -> None:
    with pytest.raises(TypeError, match="keep"):
        prepare_qat(Net(functional), keep=keep)


@pytest.mark.parametrize("keep", ["typo", ("typo",), nn.LSTM])
def test_an_entry_of_keep_matches_a_module(keep: Any) -> None:
    with pytest.raises(ValueError, match=r"keep: ('typo'|LSTM) matches no module"):
        prepare_qat(Net(functional), keep=keep)


def test_floats_before_and_after_the_layers_are_free(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(
        nn.Embedding(10, 6), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 4), nn.GELU()
    ).eval()
    x = torch.randint(10, (8, 2))
    assert_int8_is_simulated(calibrate(prepare_qat(net, SPEC), [x]), x)
    assert "stay in float: 0 (Embedding), 2 (LayerNorm)" in caplog.text


def test_batch_norm_after_a_linear_layer_is_fused() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5)
    nn.init.normal_(norm.weight)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    net = nn.Sequential(nn.Linear(6, 5), norm, nn.ReLU6(), nn.Linear(5, 2)).eval()
    x = torch.randn(16, 6)
    simulated = calibrate(prepare_qat(net, SPEC), [x])
    assert_int8_is_simulated(simulated, x)
    with pytest.raises(ValueError, match="does not normalize the features"):
        simulated(torch.randn(16, 5, 6))


def test_relu6_ends_at_6() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1)).eval()
    x = 100 * X
    integer = quantize(net, [x])
    layer = next(module for module in integer.modules() if isinstance(module, IntegerLayer))
    assert layer.grid.scale * (layer.grid.quant_max - layer.grid.zero_point) <= 6.0001


def test_what_the_graph_calls_is_found_under_readable_names() -> None:
    marked = mark(Net(concatenated).eval())
    assert {name for name, _ in marked.named_modules()} >= {"cat", "cat_1", "enter", "leave", "bn"}
    assert type(marked.cat) is Cat
    assert type(marked.avgpool) is AvgPool
    fused = fuse(mark(Net(residual).eval()))
    assert type(fused.first) is Fused
    assert not hasattr(fused, "bn")
    assert type(fused.add) is Add
    assert fused.add.relu


def test_bits_of_layers_can_be_overridden_by_their_names() -> None:
    overrides = [{"layer": "add", "activation_bits": 5}, {"layer": "second", "weight_bits": 3}]
    made = prepare_qat(Net(residual), QuantSpec(overrides=overrides))
    assert made.add.output_quant.bits == 5
    assert made.second.weight_quant.bits == 3


@by_name
def test_bayesian_layers_draw_the_same_noise_as_in_float(forward: Forward) -> None:
    net = Net(forward).eval()
    called = {name for _, name, _ in mark(net).named_calls()}
    for name in [name for name, _ in net.named_children() if name not in called]:
        delattr(net, name)  # a draw of a layer takes random numbers even if nothing calls it
    to_bayes(net, prior_std=0.1, init_rho=-4.0)
    marked = mark(deepcopy(net))
    simulated = calibrate(prepare_qat(net, SPEC), [X])
    enable(simulated, False)
    with torch.no_grad():
        draws = predictive_of(net)
        assert torch.equal(predictive_of(marked), draws)
        torch.testing.assert_close(predictive_of(simulated), draws, rtol=1e-4, atol=1e-4)
    enable(simulated)
    assert_int8_is_simulated(simulated)


def predictive_of(net: nn.Module) -> Tensor:
    return predictive(net, X, num_samples=3)


def test_mc_dropout_is_exact() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.drop(net.relu(net.first(x)))
        return head(net, net.drop(net.second(x) + x))

    net = to_mcdropout(Net(forward), rate=0.3).eval()
    simulated = calibrate(prepare_qat(net, SPEC), [X])
    assert_int8_is_simulated(simulated)
    draws = predictive_of(convert(simulated))
    assert not torch.equal(draws[0], draws[1])


def test_an_ensemble_becomes_integers_member_by_member() -> None:
    ensemble = Ensemble(Net(residual), num_members=2)
    for _ in range(2):
        for param in ensemble.current.parameters():
            param.data.add_(0.1 * torch.randn_like(param))
        ensemble.collect()
    simulated = calibrate(prepare_qat(ensemble.eval(), SPEC), [X])
    expected = predictive(simulated, X, num_samples=2)
    assert torch.equal(predictive(convert(simulated, probe=X), X, num_samples=2), expected)


def test_modes_of_modules_stay() -> None:
    net = Net(residual).train()
    net.second.eval()
    net.relu.eval()
    marked = mark(net)
    modes = {name: module.training for name, module in marked.named_modules()}
    assert not modes["second"]
    assert not modes["relu"]
    assert modes["first"]
    assert modes["add"]
    assert modes[""]


def test_states_load_into_a_network_that_is_prepared_again() -> None:
    first, second = (prepare_qat(Net(concatenated), SPEC) for _ in range(2))
    calibrate(first, [X])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(X), second.eval()(X))


@pytest.mark.parametrize(
    ("net", "batches", "spec", "message"),
    [
        (nn.Linear(3, 2), X[:, 0, 0, :3], None, "batches is a Tensor; give a list"),
        (nn.Linear(3, 2), None, None, "batches is a NoneType"),
        (nn.Linear(3, 2), [], None, "batches: it is empty"),
        (nn.Linear(3, 2), [{"x": X}], None, "batches: a batch is "),
        (nn.Linear(3, 2), [torch.tensor(1.0)], None, "batches: a batch is "),
        (nn.Linear(3, 2), [torch.ones(4, 3).long()], None, "enter reads torch.int64"),
        (nn.Linear(3, 2), [torch.full((4, 3), torch.nan)], None, "NaN or infinity"),
        (nn.Linear(3, 2), [torch.ones(4, 3)], {"weight_bits": 4}, "is not a QuantSpec"),
        (prepare_qat(nn.Sequential(nn.Linear(3, 2))), [X], None, "quantized already"),
        (quantize(nn.Sequential(nn.Linear(3, 2)), [torch.ones(4, 3)]), [X], None, "already"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    net: nn.Module, batches: Any, spec: Any, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        quantize(nn.Sequential(net), batches, spec)
    one_line(error.value)


def loaded(net: nn.Module) -> nn.Module:
    """Save a whole network, and load it."""
    file = BytesIO()
    torch.save(net, file)
    file.seek(0)
    made: nn.Module = torch.load(file, weights_only=False)
    return made


@pytest.mark.parametrize("again", [loaded, lambda n: pickle.loads(pickle.dumps(n)), copy.copy])
@pytest.mark.parametrize("engine", ["fbgemm", "onednn"])
@pytest.mark.parametrize("forward", [residual, shuffled, changed_in_place])
def test_a_network_can_be_pickled_and_copied(
    forward: Forward, engine: str, again: Callable[[nn.Module], nn.Module]
) -> None:
    spec = QuantSpec(activation_observer="minmax", engine=engine)
    simulated = prepare_qat(Net(forward), spec)
    simulated.train()(X)
    simulated.eval()
    restored = again(simulated)
    assert isinstance(restored, Traced)
    assert repr(restored) == repr(simulated)
    assert list(restored.state_dict()) == list(simulated.state_dict())
    assert torch.equal(restored(X), simulated(X))
    integer = convert(simulated)
    assert torch.equal(again(integer)(X), integer(X))
    if again is not copy.copy:  # a shallow copy shares its layers
        assert torch.equal(convert(restored)(X), integer(X))


def test_a_bayesian_int8_network_can_be_pickled() -> None:
    net = to_bayes(Net(functional).eval(), prior_std=0.1)
    integer = quantize(net, [X])
    assert torch.equal(predictive(loaded(integer), X, 2), predictive(integer, X, 2))


def asking_layers(net: Net, x: Tensor) -> Tensor:
    x = net.first(x.to(net.first.weight.dtype).to(net.head.weight.device))
    x = F.relu(x).mean((2, 3)).view(-1, net.first.weight.shape[0])
    return net.head(x).view(-1, net.head.out_features) * len(net.head.weight)


def test_a_forward_may_ask_the_sizes_dtype_and_device_of_layers() -> None:
    net = Net(asking_layers).eval()
    assert torch.equal(mark(deepcopy(net))(X), net(X))
    simulated = prepare_qat(net)
    simulated.train()(X).sum().backward()
    assert_int8_is_simulated(simulated.eval())
    double = simulated.double()
    assert double.like_first_weight.dtype == torch.float64  # it follows the network


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda n, x: head(n, n.first(x)) @ n.head.weight, "reads the weight of head, a Linear"),
        (lambda n, x: head(n, n.first(x)) + n.head.bias, "reads the bias of head, a Linear"),
        (
            lambda n, x: n.bn(n.first(x)).mean((2, 3)) * n.bn.running_mean,
            "reads the running_mean of bn, a BatchNorm2d",
        ),
    ],
)
def test_a_forward_that_reads_tensors_of_layers_is_refused(forward: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"{message}, which becomes integers; keep it") as error:
        prepare_qat(Net(forward))
    one_line(error.value)


def test_tensors_of_layers_in_float_may_be_read() -> None:
    net = Net(lambda n, x: head(n, n.first(x)) @ n.head.weight).eval()
    simulated = prepare_qat(net, keep=("head",))
    simulated.train()(X)
    assert_int8_is_simulated(simulated.eval())


def test_random_numbers_are_refused_without_training_too() -> None:
    net = Net(lambda n, x: head(n, n.first(x + torch.rand_like(x))))
    with pytest.raises(TypeError, match="rand_like, called by the network itself, draws"):
        quantize(net, [X])


def by_keywords(net: Net, x: Tensor) -> Tensor:
    x = net.relu(input=net.second(input=F.relu(input=net.first(input=x))))
    return net.head(torch.flatten(input=F.adaptive_avg_pool2d(input=x, output_size=1), start_dim=1))


def test_inputs_may_be_passed_as_keywords() -> None:
    simulated = calibrate(prepare_qat(Net(by_keywords).eval(), SPEC), [X])
    assert_int8_is_simulated(simulated)


def test_a_batch_norm_over_another_axis_is_refused_by_name_unless_kept() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(4, 5, 6)
    with pytest.raises(TypeError, match=r"^0: a BatchNorm1d\(5\) after 8 outputs") as error:
        prepare_qat(net)
    one_line(error.value)
    assert quantize(net, [x], keep=("1",))(x).shape == (4, 5, 2)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1) -> Tensor:
        out: Tensor = self.layer(left + right * scale)
        return out


def test_a_network_of_two_inputs_is_quantized_in_steps() -> None:
    left, right = torch.randn(2, 8, 3)
    with pytest.raises(TypeError, match=r"needs 2 inputs \(left, right\), and quantize") as error:
        quantize(TwoInputs(), [(left, right)])
    one_line(error.value)
    simulated = prepare_qat(TwoInputs())
    simulated.train()(left, right)
    simulated.eval()
    assert torch.equal(convert(deepcopy(simulated))(left, right), simulated(left, right))


def test_many_modules_of_one_kind_are_kept_by_their_type() -> None:
    net = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(4, 4), nn.SiLU()))).eval()
    message = r"keep=\('1',\), or all of its type with keep=\(nn.SiLU,\)"
    with pytest.raises(TypeError, match=message) as error:
        prepare_qat(net)
    one_line(error.value)
    quantize(net, [torch.randn(8, 4)], keep=(nn.SiLU,))


def test_wrappers_of_a_network_are_refused_with_the_network() -> None:
    for wrap, inner in ((nn.DataParallel, "module"), (torch.compile, "_orig_mod")):
        with pytest.raises(TypeError, match=f"wraps the network; give net.{inner}"):
            prepare_qat(wrap(nn.Sequential(nn.Linear(3, 2))))
