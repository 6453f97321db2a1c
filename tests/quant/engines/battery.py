"""What every engine must do. Each engine's test module inherits it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bqnn.inference.predict import predictive
from bqnn.layers.bayes import to_bayes
from bqnn.layers.draws import held_draw
from bqnn.layers.dropout import to_mcdropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.markers import Add, DropoutSite, Enter, Leave
from bqnn.quant.engines import engine, usable_engine
from bqnn.quant.engines.contract import ActivationGrid, LayerEngine
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import convert
from bqnn.quant.quantize import prepare_qat, quantize
from bqnn.quant.reconstruction import calibrate_by
from bqnn.quant.simulated import SimulatedAdd, calibrate, prepare, use_engine
from bqnn.quant.spec import ENGINES, SYMMETRIC_ONLY, QuantSpec
from bqnn.quant.summary import disagreements
from tests.quant.conftest import SHAPES, float_net, inputs

METHODS = ("pointwise", "bbb", "mcdropout", "sghmc")
NETS = tuple(SHAPES)
BITS = range(2, 9)
FEW = ((8, 8), (8, 7), (4, 7), (2, 2))


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "pool after a reshape": lambda x: functional.max_pool2d(x.reshape(len(x), 4, 9, 6), 2),
    "first rows of pixels": lambda x: x[:, :, :5],
    "first columns": lambda x: x[..., :6],
    "narrow": lambda x: x.narrow(3, 0, 7),
    "last columns": lambda x: x[..., 2:],
    "transpose": lambda x: x.transpose(2, 3),
    "transpose and cut": lambda x: x.transpose(2, 3)[:, :, :6],
    "sum of halves": lambda x: x[..., :4] + x[..., 5:],
    "sum that broadcasts": lambda x: x[:, :, :1] + x,
    "sum that broadcasts twice": lambda x: x[:, :, :1] + x[:, :, :, :1],
    "rows of the batch": lambda x: x + x[:1],
}


SUMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "layer and input": lambda m, x: m.conv(x) + x,
    "input and layer, relu": lambda m, x: torch.relu(x + m.conv(x)),
    "two layers": lambda m, x: m.conv(x) + m.point(x),
    "two layers of other geometry": lambda m, x: torch.relu(m.stride(x) + m.dilated(x)),
    "depthwise": lambda m, x: torch.relu(m.depthwise(x) + x),
    "grouped": lambda m, x: m.grouped(x) + x,
    "sum of sums": lambda m, x: m.conv(torch.relu(m.point(x) + x)) + m.grouped(x),
    "a layer that others read": lambda m, x: m.point(a := m.conv(x)) + a,
    "a layer that is added to itself": lambda m, x: (a := m.conv(x)) + a,
    "a layer that is called twice": lambda m, x: m.conv(m.conv(x) + x) + x,
    "relu of a layer": lambda m, x: torch.relu(m.conv(x)) + x,
    "pool of a layer": lambda m, x: functional.max_pool2d(m.conv(x), 2) + m.stride(x),
    "an input that changes in between": lambda m, x: m.conv(y := m.point(x)) + torch.relu_(y),
    "an input that a module changes in between": lambda m, x: m.conv(y := m.point(x)) + m.act(y),
    "a layer that broadcasts": lambda m, x: m.conv(x[:, :, :1]) + x,
    "equal sums": lambda m, x: m.conv((y := m.point(x)) + y) + m.conv(y + y),
    "an input that broadcasts": lambda m, x: m.conv(x) + x[:, :, :1],
    "linear": lambda m, x: (y := x[:, :, 0, 0]) + m.linear(y),
    "linear of pixels that are a view": lambda m, x: (
        m.linear(y := x.flatten(2).transpose(1, 2)) + y
    ).transpose(1, 2),
    "linear of pixels, relu": lambda m, x: torch.relu(m.linear(y := x.movedim(1, 3)) + y),
}


class Sums(nn.Module):
    """Layers and a sum, between two convolutions."""

    def __init__(self, total: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(8, 3)
        self.conv, self.point = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.stride = nn.Conv2d(8, 8, 2, stride=2)
        self.dilated = nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.linear, self.act = nn.Linear(8, 8), nn.ReLU(inplace=True)
        self.total = total

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.total(self, self.first(x)).movedim(1, -1))


class Between(nn.Module):
    """Two convolutions with an operation between them."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.first(x)))


def simulated(method: str, net: str, **options: Any) -> nn.Module:
    spec = QuantSpec(**{"activation_observer": "minmax", "output_bits": None, **options})
    return calibrate_by(spec, prepare(fuse(float_net(method, net)), spec), [inputs(net)])


def calibrated(net: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    spec = QuantSpec(activation_observer="minmax", **options)
    return calibrate(prepare(fuse(net.eval()), spec), [x])


def assert_same_integers(made: nn.Module, x: Tensor) -> None:
    """Compare every layer on the inputs of its simulated twin, and the whole network."""
    integer = convert(copy.deepcopy(made))
    count = len(made) if isinstance(made, Ensemble) else 1
    for index in range(count):
        found = disagreements(made, integer, x, index)
        assert found
        for name, each in found.items():
            assert each.differing == 0, (name, each)
    expected, got = (predictive(net, x, count) for net in (made, integer))
    assert torch.equal(expected, got)


class EngineContract:
    """Tests of an engine; a subclass sets `name`."""

    name: str

    @pytest.fixture(autouse=True)
    def available(self) -> None:
        reason = engine(self.name).missing()
        if reason is not None:
            pytest.skip(f"engine={self.name}: {reason}")

    def test_it_is_found_by_its_name(self) -> None:
        assert usable_engine(self.name).name == self.name
        assert copy.deepcopy(engine(self.name)) is engine(self.name)
        assert pickle.loads(pickle.dumps(engine(self.name))) is engine(self.name)

    @pytest.mark.parametrize("net", NETS)
    @pytest.mark.parametrize("method", METHODS)
    def test_int8_computes_the_simulated_integers(self, method: str, net: str) -> None:
        for weight_bits, activation_bits in FEW:
            bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
            made = simulated(method, net, engine=self.name, **bits)
            assert_same_integers(made, inputs(net))

    @pytest.mark.parametrize("weight_bits", BITS)
    def test_at_every_bit_width(self, weight_bits: int) -> None:
        for activation_bits in BITS:
            bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
            made = simulated("bbb", "resnet", engine=self.name, **bits)
            assert_same_integers(made, inputs("resnet"))

    @pytest.mark.slow
    @pytest.mark.parametrize("weight_bits", BITS)
    @pytest.mark.parametrize("net", NETS)
    @pytest.mark.parametrize("method", METHODS)
    def test_all_methods_and_networks_at_every_bit_width(
        self, method: str, net: str, weight_bits: int
    ) -> None:
        for activation_bits in BITS:
            bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
            made = simulated(method, net, engine=self.name, **bits)
            assert_same_integers(made, inputs(net))

    @pytest.mark.parametrize("method", ["pointwise", "bbb"])
    @pytest.mark.parametrize(
        "scheme",
        [
            {"weight_granularity": "tensor"},
            {"weight_granularity": "tensor", "weight_symmetric": False},
            {"weight_symmetric": False},
            {"strategy": "parameters"},
            {"strategy": "weights"},
            {"sigma_grid": "log"},
            {"rounding": "stochastic"},
            {"rounding": "stochastic", "strategy": "weights"},
            {"weight_observer": "least_squares"},
            {"weight_rounding": "adaptive", "bias_correction": True},
        ],
        ids=[
            *("tensor", "affine tensor", "affine", "parameters", "weights", "log"),
            *("stochastic", "stochastic weights", "least squares", "adaptive"),
        ],
    )
    def test_at_other_schemes(self, scheme: dict[str, Any], method: str) -> None:
        if self.name in SYMMETRIC_ONLY and not scheme.get("weight_symmetric", True):
            with pytest.raises(ValueError, match="supports only symmetric weights"):
                QuantSpec(engine=self.name, **scheme)
            return
        for net in NETS:
            made = simulated(method, net, weight_bits=4, engine=self.name, **scheme)
            assert_same_integers(made, inputs(net))

    def test_the_largest_products_are_summed_right(self) -> None:
        """Some CPUs sum pairs of products in 16 bits, which 8-bit activations exceed."""
        for groups in (1, 4, 16):
            layer = nn.Conv2d(16, 16, 3, padding=1, groups=groups)
            nn.init.constant_(layer.weight, 1)
            nn.init.zeros_(layer.bias)
            net = nn.Sequential(Enter(), layer, nn.ReLU(), nn.Flatten(), nn.Linear(576, 3), Leave())
            nn.init.constant_(net[4].weight, 1)
            x = torch.ones(8, 16, 6, 6)
            made = calibrated(net, x, activation_bits=8, engine=self.name)
            assert_same_integers(made, x)
            # Of the 9 taps, 9 lie within the image at 16 pixels, 6 at 16, and 4 at 4.
            expected = 16 * 16 / groups * (16 * 9 + 16 * 6 + 4 * 4)
            assert convert(made)(x)[0, 0].item() == pytest.approx(expected, rel=0.01)

    def test_sums_that_no_float32_holds(self) -> None:
        net = nn.Sequential(Enter(), nn.Linear(4096, 8, bias=False), Leave())
        nn.init.uniform_(net[1].weight, 0.5, 1)  # sums of about 4096 * 0.75 * 127 * 0.5 * 255
        x = torch.rand(32, 4096)
        assert_same_integers(calibrated(net, x, activation_bits=8, engine=self.name), x)

    @pytest.mark.parametrize("method", METHODS)
    def test_linear_layers_take_any_number_of_leading_dimensions(self, method: str) -> None:
        for shape in ((8, 12, 16), (5, 3, 4, 16), (7, 16)):
            torch.manual_seed(0)
            net: nn.Module = nn.Sequential(
                Enter(), nn.Linear(16, 9), nn.ReLU(), nn.Dropout(0), nn.Linear(9, 4), Leave()
            )
            if method == "bbb":
                to_bayes(net, prior_std=0.3, init_rho=-3.0)
            elif method == "mcdropout":
                to_mcdropout(net, 0.25)
            elif method == "sghmc":
                net = Ensemble(net, 1)
                net.collect()
            x = torch.randn(shape)
            assert_same_integers(calibrated(net, x, engine=self.name), x)

    @pytest.mark.parametrize(
        "pool",
        [
            nn.MaxPool2d(2),
            nn.MaxPool2d(3, 2, padding=1),
            nn.MaxPool2d(3, 1, dilation=2),
            nn.MaxPool2d((3, 2), (2, 1), ceil_mode=True),
            nn.MaxPool2d(2, 2, padding=1, ceil_mode=True),
            nn.MaxPool2d(2, 3, padding=1, ceil_mode=True),
        ],
        ids=str,
    )
    def test_max_pools(self, pool: nn.Module) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(Enter(), nn.Conv2d(3, 5, 3), pool, nn.ReLU(), nn.Flatten())
        x = torch.randn(4, 3, 19, 18)
        count = net(x).shape[1]
        for memory_format in (torch.contiguous_format, torch.channels_last):
            made = nn.Sequential(*copy.deepcopy(net), nn.Linear(count, 2), Leave())
            rows = x.to(memory_format=memory_format)
            assert_same_integers(calibrated(made, rows, engine=self.name), rows)

    @pytest.mark.parametrize("relu", [False, True])
    def test_residual_sums_of_grids_with_and_without_zero_points(self, relu: bool) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.enter, self.leave = Enter(), Leave()
                self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
                self.act, self.add, self.last = nn.ReLU(), Add(relu), Add(relu=False)

            def forward(self, x: Tensor) -> Tensor:
                x = self.enter(x)
                a, b = self.first(x), self.second(x)
                return self.leave(self.last(self.add(a, b), self.act(a)))

        torch.manual_seed(0)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(16, 3, 9, 9).to(memory_format=memory_format)
            for bits in (8, 7, 3):
                made = calibrated(Block(), x, activation_bits=bits, engine=self.name)
                assert_same_integers(made, x)

    @pytest.mark.parametrize("total", SUMS, ids=str)
    def test_sums_of_what_layers_compute(self, total: str) -> None:
        torch.manual_seed(0)
        x = torch.randn(6, 2, 8, 8)
        for bits in (8, 7):
            spec = QuantSpec(activation_observer="minmax", activation_bits=bits, engine=self.name)
            made = calibrate(prepare_qat(Sums(SUMS[total]), spec), [x]).eval()
            assert_same_integers(made, x)
            integer = convert(copy.deepcopy(made))
            for rows in (x[:1], x.to(memory_format=torch.channels_last), x[:0]):
                with torch.no_grad():
                    assert torch.equal(integer(rows), made(rows)), rows.shape

    def test_sums_with_dropout(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.enter, self.leave, self.add = Enter(), Leave(), Add()
                self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
                self.shortcut, self.residual = DropoutSite(), DropoutSite()

            def forward(self, x: Tensor) -> Tensor:
                x = self.first(self.enter(x))
                x = self.add(self.second(x), self.shortcut(x))
                return self.leave(self.add(self.residual(self.second(x)), x))

        torch.manual_seed(0)
        x = torch.randn(8, 3, 6, 6)
        made = calibrated(to_mcdropout(Block(), 0.25), x, engine=self.name)
        assert_same_integers(made, x)

    @pytest.mark.parametrize(
        "view",
        [lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2)[:, :1], lambda x: x[..., :1]],
        ids=["transposed", "row", "column"],
    )
    def test_sums_of_views_round_as_those_of_their_copies(
        self, view: Callable[[Tensor], Tensor]
    ) -> None:
        chosen = engine(self.name)
        if not isinstance(chosen, LayerEngine):
            return
        generator = torch.Generator().manual_seed(0)
        output = ActivationGrid(0.2, 7, 255)
        for _ in range(8):
            x, y = torch.randint(0, 255, (2, 1, 64, 64), generator=generator).byte()
            whole = chosen.wrap(view(y).expand(x.shape).contiguous(), 0.07, 5)
            first, second = chosen.wrap(x, 0.1, 3), view(chosen.wrap(y, 0.07, 5))
            for relu in (False, True):
                expected = chosen.integers(chosen.add(first, whole, output, relu))
                for summands in ((first, second), (second, first)):
                    got = chosen.integers(chosen.add(*summands, output, relu))
                    assert torch.equal(got, expected)

    def test_dropout_outside_of_the_integers(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4), nn.ReLU(), nn.Dropout(0.5))
        net.extend([nn.Linear(4, 64), nn.Dropout(0.5)])
        x = torch.randn(16, 6)
        spec = QuantSpec(engine=self.name, activation_observer="minmax")
        made = calibrate(prepare_qat(to_mcdropout(net, None).eval(), spec), [x]).eval()
        assert_same_integers(made, x)

    @pytest.mark.parametrize("other", ENGINES)
    def test_the_engine_of_a_quantized_network_can_be_changed(self, other: str) -> None:
        if engine(other).missing() is not None:
            pytest.skip(f"engine={other}: {engine(other).missing()}")
        x = inputs("resnet", rows=8)
        made = simulated("pointwise", "resnet", engine=self.name)
        expected = made(x)
        use_engine(made, other)
        assert_same_integers(made, x)
        step = max(float(m.output_quant.scale) for m in made.modules() if type(m) is SimulatedAdd)
        assert (made(x) - expected).abs().mean() < step

    @pytest.mark.parametrize("between", BETWEEN, ids=str)
    def test_what_moves_cuts_or_adds_between_layers(self, between: str) -> None:
        torch.manual_seed(0)
        x = torch.randn(6, 2, 6, 9)
        spec = QuantSpec(activation_observer="minmax", engine=self.name)
        made = calibrate(prepare_qat(Between(BETWEEN[between]), spec), [x]).eval()
        integer = convert(copy.deepcopy(made))
        if self.name == "onnxruntime" and between == "rows of the batch":
            with pytest.raises(TypeError, match="changes the axis of the rows"):
                integer(x[:1])
            return
        for rows in (x[:1], x, x[:3], x.to(memory_format=torch.channels_last), x[:0]):
            with torch.no_grad():
                assert torch.equal(integer(rows), made(rows)), rows.shape

    def test_a_window_in_the_padding_of_a_depthwise_convolution(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(Enter(), nn.Conv2d(2, 16, 3, padding=1))
        net.extend([nn.Conv2d(16, 32, 2, padding=2, groups=16), nn.Conv2d(32, 3, 1), Leave()])
        x = torch.randn(4, 2, 7, 6)
        for _ in range(3):
            assert_same_integers(calibrated(copy.deepcopy(net), x, engine=self.name), x)

    def test_convert_refuses_weights_that_the_engine_does_not_know(self) -> None:
        made = simulated("pointwise", "mlp", weight_symmetric=False)
        x = inputs("mlp")
        if self.name in SYMMETRIC_ONLY:
            with pytest.raises(ValueError, match=f"engine={self.name} supports only symmetric"):
                convert(made, self.name)
        else:
            expected = made(x).detach()
            assert (convert(made, self.name)(x) - expected).abs().max() < 0.1

    def test_one_draw_serves_many_batches(self) -> None:
        integer = convert(simulated("bbb", "mlp", engine=self.name))
        x = inputs("mlp")
        with held_draw(integer, 0):
            assert torch.equal(integer(x)[:8], integer(x[:8]))
        assert not torch.equal(integer(x), integer(x))

    @pytest.mark.parametrize("method", METHODS)
    def test_copies_and_pickles_compute_the_same(self, method: str) -> None:
        integer, x = convert(simulated(method, "lenet", engine=self.name)), inputs("lenet")
        expected = predictive(integer, x, 2)
        for twin in (copy.deepcopy(integer), pickle.loads(pickle.dumps(integer))):
            assert torch.equal(predictive(twin, x, 2), expected)

    def test_an_input_that_is_not_finite_is_refused(self) -> None:
        integer, x = convert(simulated("pointwise", "mlp", engine=self.name)), inputs("mlp")
        x[3, 2] = torch.nan
        with pytest.raises(ValueError, match=r"row 3 .* remove these rows"):
            integer(x)

    @pytest.mark.parametrize("net", NETS)
    def test_inputs_of_any_layout_and_precision(self, net: str) -> None:
        x = inputs(net, rows=16)
        made = simulated("pointwise", net, engine=self.name)
        integer = convert(copy.deepcopy(made))
        shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        alike = {
            "float64": x.double(),
            "strided rows": x.repeat_interleave(2, 0)[::2],
            "other rows": x[shuffled][shuffled.argsort()],
            "reversed axes": x.permute(*reversed(range(x.dim())))
            .contiguous()
            .permute(*reversed(range(x.dim()))),
            "contiguous": x.contiguous(),
            "a part": functional.pad(x, (1, 2))[..., 1:-2],
            "with gradient": x.clone().requires_grad_(),
        }
        with torch.no_grad():
            expected = made(x)
            for name, rows in alike.items():
                for each in (made, integer):
                    assert torch.equal(each(rows), expected), name
            for dtype in (torch.float16, torch.bfloat16):
                expected = made(x.to(dtype).float())
                for each in (made, integer):
                    assert torch.equal(each(x.to(dtype)), expected), dtype
            assert made(x[:0]).shape == integer(x[:0]).shape == (0, *expected.shape[1:])
            repeated = x[:1].expand(5, *x.shape[1:])
            assert torch.equal(made(repeated), integer(repeated))

    @pytest.mark.parametrize("net", NETS)
    def test_inputs_that_a_network_cannot_take(self, net: str) -> None:
        x = inputs(net, rows=4)
        made = simulated("pointwise", net, engine=self.name)
        refused: dict[str, tuple[Tensor, type[Exception], str]] = {
            "integers": (x.int(), TypeError, r"reads torch.int32, .* convert the inputs with"),
            "bytes": (x.byte(), TypeError, r"reads torch.uint8, .* convert the inputs with"),
            "features": (
                torch.cat([x, x], 1),
                ValueError,
                r"takes inputs \[.*not of shape .* pass",
            ),
            "infinite": (x.double() * 1e300, ValueError, r"NaN or infinity, first row 0"),
        }
        if x.dim() == 4:
            refused["one image"] = (x[0], ValueError, r"takes \[B, .* add the batch dimension")
        if net == "lenet":
            small = x[:, :, :6]
            refused["size"] = (small, ValueError, r"takes inputs \[\.\.\., .* not of shape")
        for name, (rows, error, message) in refused.items():
            for each in (made, convert(copy.deepcopy(made))):
                with torch.no_grad(), pytest.raises(error, match=message) as raised:
                    each(rows)
                assert "\n" not in str(raised.value), name

    def test_images_that_are_smaller_than_a_kernel(self) -> None:
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, (5, 3)))
        x = torch.randn(4, 1, 9, 9)
        made = calibrate(prepare_qat(net, QuantSpec(engine=self.name)), [x]).eval()
        for each in (made, convert(copy.deepcopy(made))):
            with torch.no_grad(), pytest.raises(ValueError, match="kernel of 5x3, takes larger"):
                each(x[:, :, :6])

    def test_networks_of_plain_torch(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.AvgPool2d(2))
        net.extend([nn.Flatten(), nn.Linear(36, 5)])
        x = torch.randn(8, 3, 8, 8)
        quantized = quantize(net.eval(), [x], QuantSpec(engine=self.name))
        assert (quantized(x) - net(x)).abs().mean() < 0.1 * net(x).abs().mean()
