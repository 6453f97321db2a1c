"""Modules between Enter and Leave run as simulated, or are refused before training."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bqnn.layers.dropout import MCDropout
from bqnn.layers.markers import Add, Enter, Leave, Pool
from bqnn.quant.fuse import fuse
from bqnn.quant.grids import OnGrid
from bqnn.quant.integer import convert
from bqnn.quant.simulated import calibrate, prepare
from bqnn.quant.spec import QuantSpec

SPEC = QuantSpec(activation_observer="minmax")
REFUSED_MODULES = [
    nn.GELU(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.LeakyReLU(),
    nn.Hardtanh(),
    nn.ReLU6(),
    nn.SiLU(),
    nn.Hardswish(),
    nn.ELU(),
    nn.Softplus(),
    nn.Softmax(1),
    nn.AvgPool2d(2),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveMaxPool2d(2),
    nn.LPPool2d(2, 2),
    nn.Upsample(scale_factor=2),
    nn.PixelShuffle(2),
    nn.ZeroPad2d(1),
    nn.ReflectionPad2d(1),
    nn.BatchNorm2d(4, affine=False),
    nn.InstanceNorm2d(4),
    nn.GroupNorm(2, 4, affine=False),
    nn.LocalResponseNorm(2),
    nn.AlphaDropout(),
]
WITH_PARAMETERS = [
    nn.PReLU(),
    nn.LayerNorm([4, 8, 8]),
    nn.BatchNorm2d(4),
    nn.GroupNorm(2, 4),
    nn.ConvTranspose2d(4, 4, 1),
    nn.MultiheadAttention(8, 2),
    nn.LSTM(8, 8),
    nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
]
KEPT_MODULES = [
    nn.Dropout(0.2),
    nn.Dropout2d(0.2),
    nn.MaxPool2d(3, 2, 1),
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.Identity(),
    nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 8, 8))),
]
REFUSED_CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: torch.relu(x + x),
    "sub": lambda x: x - x,
    "mul": lambda x: x * 2,
    "pow": lambda x: x**2,
    "neg": lambda x: -x,
    "gelu": lambda x: F.gelu(x),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "pad": lambda x: F.pad(x, (1, 1)),
    "cat": lambda x: torch.cat([x, x], 2),
    "stack": lambda x: torch.stack([x, x])[0],
    "mean": lambda x: x.mean(1, keepdim=True).expand_as(x),
    "clamp": lambda x: x.clamp(0, 1),
    "double": lambda x: x.double().float(),
    "maximum": lambda x: torch.maximum(x, x),
    "data": lambda x: x.data,
    "mul_": lambda x: x.mul_(2),
}
KEPT_CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.contiguous().view(x.size(0), -1).view(x.shape),
    "reshape": lambda x: x.reshape(x.shape[0], 4, -1).reshape(x.shape),
    "permute": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "transpose": lambda x: x.transpose(2, 3),
    "slice": lambda x: x[:, :, 1:],
    "chunk": lambda x: x.chunk(2, dim=2)[0],
    "relu": lambda x: F.relu(x),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "layout": lambda x: x.to(memory_format=torch.channels_last),
    "off": lambda x: F.dropout(x, training=False),
}


class Call(nn.Module):
    """A call in a `forward`; if it must not be traced, it depends on its inputs."""

    def __init__(self, call: Callable[[Tensor], Tensor], traceable: bool = True) -> None:
        super().__init__()
        self.call = call
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.shape[0] == 0:
            return x
        return self.call(x)


def around(*inner: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        Enter(),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Sequential(*inner),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        Pool(),
        nn.Linear(4, 2),
        Leave(),
    )


X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def one_line(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 400
    return message


def assert_int8_agrees(net: nn.Module) -> None:
    made = calibrate(prepare(fuse(net), SPEC), [X])
    with torch.no_grad():
        expected = made(X)
        assert torch.equal(convert(made, "fbgemm", probe=X)(X), expected)


@pytest.mark.parametrize("module", REFUSED_MODULES, ids=lambda module: type(module).__name__)
def test_modules_without_integers_are_refused_by_name(module: nn.Module) -> None:
    net = fuse(around(module))
    with pytest.raises(
        TypeError, match=rf"2\.0, an? {type(module).__name__},.* put a Leave"
    ) as error:
        prepare(net, SPEC)
    one_line(error.value)


@pytest.mark.parametrize("module", WITH_PARAMETERS, ids=lambda module: type(module).__name__)
def test_modules_with_unknown_parameters_are_refused_by_name(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"^2\.[01]\b") as error:
        fuse(
            around(nn.MaxPool2d(1), module)
            if isinstance(module, nn.BatchNorm2d)
            else around(module)
        )
    one_line(error.value)


@pytest.mark.parametrize("module", KEPT_MODULES, ids=lambda module: type(module).__name__)
def test_modules_that_keep_integers_are_exact(module: nn.Module) -> None:
    assert_int8_agrees(around(module))


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_calls_without_integers_are_refused_before_training(name: str) -> None:
    net = fuse(around(Call(REFUSED_CALLS[name])))
    with pytest.raises(TypeError, match=rf"prepare: {name}, called by [\d.]+, cannot run") as error:
        prepare(net, SPEC)
    one_line(error.value)


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_calls_that_no_trace_shows_are_refused_by_the_first_batch(name: str) -> None:
    net = prepare(fuse(around(Call(REFUSED_CALLS[name], traceable=False))), SPEC).train()
    with pytest.raises(
        TypeError, match=rf"^{name} cannot run in int8 on the integers of 1;"
    ) as error:
        net(X)
    one_line(error.value)
    with pytest.raises(TypeError, match=f"^{name} cannot run"):
        calibrate(net, [X])


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("name", KEPT_CALLS)
def test_calls_that_keep_integers_are_exact(name: str, traceable: bool) -> None:
    assert_int8_agrees(around(Call(KEPT_CALLS[name], traceable)))


def test_dropout_that_stays_on_is_refused() -> None:
    with pytest.raises(TypeError, match=r"dropout, called by 2\.0,"):
        prepare(fuse(around(Call(lambda x: F.dropout(x, 0.5)))), SPEC)


class Residual(nn.Module):
    def __init__(self, add: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.a(x), self.b(x))


class Plus(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x + y)


def test_a_sum_of_two_layers_needs_add() -> None:
    assert_int8_agrees(around(Residual(Add())))
    with pytest.raises(TypeError, match=r"add, called by 2\.0\.add,.* Add for a residual sum"):
        prepare(fuse(around(Residual(Plus()))), SPEC)


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 1)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(Enter(), conv()), "has no Leave"),
        (nn.Sequential(conv(), Leave()), "has no Enter"),
        (nn.Sequential(conv(), Enter(), conv(), Leave()), "0 is a Conv2d outside"),
        (nn.Sequential(Enter(), conv(), Leave(), conv()), "3 is a Conv2d outside"),
        (nn.Sequential(Enter(), Enter(), conv(), Leave()), "1 is an Enter inside"),
        (nn.Sequential(Enter(), conv(), Enter(), Leave()), "2 is an Enter inside"),
        (nn.Sequential(Enter(), conv(), Leave(), Leave()), "3 is a Leave outside"),
        (nn.Sequential(Enter(), conv(), Leave(), Pool()), "3 is a Pool outside"),
        (nn.Sequential(Enter(), Leave(), Enter(), conv()), "output of 3 leaves .* put a Leave"),
    ],
)
def test_a_region_begins_and_ends(net: nn.Module, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        prepare(fuse(net), SPEC)
    one_line(error.value)


class Twice(Pool):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Begin(Enter):
    pass


class End(Leave):
    pass


class Drop(MCDropout):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(Enter(), conv(), Twice(), Leave()),
        nn.Sequential(Begin(), conv(), Leave(), Enter()),
        nn.Sequential(Enter(), conv(), End(), Leave()),
        nn.Sequential(Enter(), conv(), Drop(0.1), Leave()),
    ],
)
def test_markers_of_other_types_are_refused_by_name(net: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"prepare: [012] is an? (Twice|Begin|End|Drop)") as error:
        prepare(fuse(net), SPEC)
    assert "\n" not in str(error.value)


def test_floats_outside_the_region_are_free() -> None:
    net = nn.Sequential(nn.Tanh(), Enter(), conv(), Leave(), nn.GELU(), Enter(), conv(), Leave())
    assert_int8_agrees(nn.Sequential(*net, nn.Softmax(1)))


def test_parameters_outside_the_region_stay_in_float() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    front = nn.Sequential(nn.PReLU(), nn.BatchNorm2d(3), Enter(), conv(), nn.ReLU(), Leave())
    net = nn.Sequential(front, nn.Flatten(1, 2), encoder, nn.LayerNorm(8)).eval()
    assert_int8_agrees(net)
    assert type(encoder.linear1) is nn.Linear
    with pytest.raises(TypeError, match="1 is a PReLU"):
        fuse(nn.Sequential(Enter(), nn.PReLU(), conv(), Leave(), nn.PReLU()))


def test_a_block_that_is_used_twice_stays_one() -> None:
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    net = around(block, block)
    assert_int8_agrees(net)
    assert net[2][0] is net[2][1]


def test_a_refused_network_is_left_as_it_was() -> None:
    net = fuse(around(nn.GELU()))
    before = [type(module) for module in net.modules()]
    with pytest.raises(TypeError):
        prepare(net, SPEC)
    assert [type(module) for module in net.modules()] == before


def test_outputs_are_plain_tensors() -> None:
    net = calibrate(prepare(fuse(around()), SPEC), [X])
    assert type(net(X)) is Tensor
    assert type(net[:2](X)) is OnGrid


class Asking(nn.Module):
    """A network with its own markers, whose forward reads an attribute of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.layer, self.leave = Enter(), nn.Linear(3, 2), Leave()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(self.layer(self.enter(x)))
        return out.view(-1, self.layer.out_features)


def test_attributes_that_integer_layers_lose_are_refused_before_training() -> None:
    with pytest.raises(TypeError, match="forward reads out_features of layer, a Linear") as error:
        prepare(fuse(Asking()), QuantSpec())
    one_line(error.value)
