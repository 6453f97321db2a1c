"""The recorded ranges are exact, and the searched range has the least squared error."""

import warnings

import pytest
import torch
from torch import Tensor

from bqnn.quant.fake_quant import FakeQuant, make_fake_quant
from bqnn.quant.observers import SMALLEST_SCALE, LeastSquaresObserver, make_observer

NUM_VALUES = 20_000


def noise(seed: int = 0, count: int = NUM_VALUES) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def laplace() -> Tensor:
    uniform = torch.rand(NUM_VALUES, generator=torch.Generator().manual_seed(1)) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())


DATA = {
    "normal": noise,
    "laplace": laplace,
    "relu": lambda: noise().relu(),
    "exponential": lambda: laplace().abs(),
    "negative": lambda: -noise().abs(),
    "off center": lambda: noise() + 1,
    "one outlier": lambda: torch.cat([noise(), torch.tensor([100.0])]),
}


def searched(batches: list[Tensor], low: int, high: int, **options: bool) -> tuple[float, int]:
    observer = LeastSquaresObserver(low, high, **options)
    for batch in batches:
        observer(batch)
    scale, zero_point = observer.grid()
    return scale.item(), int(zero_point)


def squared_error(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> float:
    x = x.double()
    rounded = ((x / scale).round() + zero_point).clamp(low, high) - zero_point
    return (rounded * scale - x).square().sum().item()


def least_error(x: Tensor, low: int, high: int) -> float:
    """Compute the smallest squared error among 60 x 60 ranges within that of the data."""
    x = x.double().sort().values
    shares = torch.arange(1, 61, dtype=torch.float64) / 60
    starts, ends = (shares * x[0].clamp(max=0)).unique(), (shares * x[-1].clamp(min=0)).unique()
    ranges = torch.cartesian_prod(starts, ends)
    scale = ranges.diff() / (high - low)
    zero_point = (low - (ranges[:, :1] / scale).round()).clamp(low, high)
    levels = scale * (torch.arange(low, high + 1) - zero_point)
    edges = torch.nn.functional.pad((levels[:, 1:] + levels[:, :-1]) / 2, (1, 1))
    edges[:, 0], edges[:, -1] = -torch.inf, torch.inf
    places = torch.searchsorted(x, edges)
    sums = torch.stack([torch.ones_like(x), x]).cumsum(1)
    count, total = torch.nn.functional.pad(sums, (1, 0))[:, places].diff()
    return float((levels * (levels * count - 2 * total)).sum(1).min() + x.square().sum())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("is_signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", DATA)
def test_no_range_has_a_smaller_error(name: str, is_signed: bool, bits: int) -> None:
    x = DATA[name]()
    low = -(2 ** (bits - 1)) if is_signed else 0
    high = low + 2**bits - 1
    scale, zero_point = searched(list(x.split(5000)), low, high)
    assert low <= zero_point <= high  # zero is a point of the grid
    error = squared_error(x, scale, zero_point, low, high)
    assert error <= 1.02 * least_error(x, low, high)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_symmetric_search_keeps_zero_in_the_center(bits: int) -> None:
    high = 2 ** (bits - 1) - 1
    x = noise()
    scale, zero_point = searched([x], -high - 1, high, symmetric=True)
    assert zero_point == 0
    largest = x.abs().max().item()
    best = min(
        squared_error(x, largest * k / (200 * high), 0, -high - 1, high) for k in range(1, 201)
    )
    assert squared_error(x, scale, zero_point, -high - 1, high) <= 1.02 * best


def test_the_order_and_the_size_of_batches_do_not_matter() -> None:
    x = torch.cat([1e-8 * noise(1), noise(2), 1e4 * noise(3, 10)])
    expected = searched([x], 0, 127)
    for batches in ([*x.split(7000)], [*x.split(7000)][::-1], [x.flip(0)], [x[:1], x[1:]]):
        assert searched(batches, 0, 127) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_a_search_scales_with_the_data(factor: float) -> None:
    scale, zero_point = searched([noise()], 0, 127)
    scaled, same = searched([factor * noise()], 0, 127)
    assert scaled == pytest.approx(factor * scale, rel=0.01)
    assert same == zero_point


def test_an_outlier_that_outweighs_all_other_values_is_kept() -> None:
    x = torch.cat([noise(), torch.tensor([1e6])])
    scale, zero_point = searched([x], 0, 127)
    assert (127 - zero_point) * scale == pytest.approx(1e6, rel=0.01)


def test_levels_of_the_data_become_levels_of_the_grid() -> None:
    pixels = torch.randint(0, 16, (5000,), generator=torch.Generator().manual_seed(0)) / 15
    scale, zero_point = searched([pixels], 0, 15)
    assert squared_error(pixels, scale, zero_point, 0, 15) < 1e-3 * (5000 * scale**2 / 12)


@pytest.mark.parametrize("kind", ["minmax", "running_minmax", "moving_average", "histogram"])
def test_constants_and_zeros(kind: str) -> None:
    for value, scale, zero_point in ((0.0, SMALLEST_SCALE, 0), (2.0, 2 / 7, 0), (-2.0, 2 / 7, 7)):
        observer = make_observer(kind, 0, 7)
        for _ in range(2):
            observer(torch.full((4, 3), value))
        assert observer.has_data
        grid = [each.item() for each in observer.grid()]
        assert grid == [pytest.approx(scale, rel=1e-6), zero_point]


@pytest.mark.parametrize("kind", ["minmax", "running_minmax", "moving_average", "histogram"])
def test_nothing_is_recorded_of_an_empty_tensor(kind: str) -> None:
    observer = make_observer(kind, 0, 7)
    observer(torch.empty(0, 3))
    assert not observer.has_data


def test_a_search_ignores_infinite_values() -> None:
    observer = LeastSquaresObserver(0, 7)
    with pytest.warns(UserWarning, match="infinite"):
        observer(torch.tensor([torch.inf, -torch.inf]))
    assert not observer.has_data
    with pytest.warns(UserWarning, match="infinite"):
        observer(torch.cat([noise(), torch.tensor([torch.inf])]))
    assert observer.grid()[0].item() == searched([noise()], 0, 7)[0]


def test_a_search_refuses_nan_values() -> None:
    with pytest.raises(ValueError, match="an activation is NaN"):
        LeastSquaresObserver(0, 7)(torch.tensor([torch.inf, 1.0, torch.nan]))


@pytest.mark.parametrize("kind", ["minmax", "running_minmax", "moving_average"])
def test_nan_values_leave_no_range(kind: str) -> None:
    quant = make_fake_quant(3, signed=False, observer=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quant.watch(torch.tensor([1.0, torch.nan]))
        quant.watch(torch.tensor([1.0]))
        quant.settle()
    assert quant.scale.isnan().all()
    assert not quant.has_range


# Two batches [2, 3], and for a kind, signed and symmetric or neither, and a number of channels, the
# scale and the zero point with which earlier versions rounded, through the observers of torch.
BATCHES = torch.tensor([[[-0.3, 0.7, 1.1], [0.2, 0.9, 0.4]], [[-1.3, 0.1, 0.2], [0.3, -0.6, 2.3]]])
EARLIER = {
    ("minmax", False, None): ([0.11612902581691742], [11]),
    ("minmax", True, None): ([0.1483870893716812], [0]),
    ("minmax", False, 2): ([0.04838709533214569, 0.09354838728904724], [27, 6]),
    ("minmax", True, 2): ([0.08387096226215363, 0.1483870893716812], [0, 0]),
    ("running_minmax", False, None): ([0.11612902581691742], [11]),
    ("running_minmax", True, None): ([0.1483870893716812], [0]),
    ("moving_average", False, None): ([0.04587096720933914], [7]),
    ("moving_average", True, None): ([0.07174193114042282], [0]),
    ("moving_average", False, 2): ([0.04519354924559593, 0.029483869671821594], [7, 0]),
    ("moving_average", True, 2): ([0.070387102663517, 0.05896773934364319], [0, 0]),
}


@pytest.mark.parametrize(("kind", "is_signed", "channels"), EARLIER)
def test_recorded_ranges_are_those_of_earlier_versions(
    kind: str, is_signed: bool, channels: int | None
) -> None:
    quant = make_fake_quant(
        5, signed=is_signed, symmetric=is_signed, channels=channels, observer=kind
    )
    for batch in BATCHES:
        quant.watch(batch)
    scale, zero_point = EARLIER[kind, is_signed, channels]
    assert quant.scale.equal(torch.tensor(scale))  # to the last bit
    assert quant.zero_point.tolist() == zero_point


def earlier_state(quant: FakeQuant) -> dict[str, Tensor]:
    """Return the state that earlier versions saved."""
    state: dict[str, Tensor] = quant.state_dict()
    state["observer.eps"] = torch.tensor([SMALLEST_SCALE])
    if isinstance(quant.observer, LeastSquaresObserver):
        state["observer.histogram"] = torch.zeros(2048)
    elif quant.channels is not None and not quant.has_range:
        state["observer.min_val"] = state["observer.max_val"] = torch.empty(0)
    return state


@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("count", [0, 1], ids=["no data", "one batch"])
def test_earlier_checkpoints_continue_bit_equal(count: int, channels: int | None) -> None:
    def made() -> FakeQuant:
        return make_fake_quant(5, signed=True, channels=channels, observer="moving_average")

    whole, resumed = made(), made()
    for batch in BATCHES[:count]:
        whole.watch(batch)
    resumed.load_state_dict(earlier_state(whole))
    for batch in BATCHES[count:]:
        whole.watch(batch)
        resumed.watch(batch)
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    assert all(
        torch.equal(each, resumed.state_dict()[key]) for key, each in whole.state_dict().items()
    )


def test_a_loaded_grid_stays_until_there_are_data() -> None:
    quant, loaded = (make_fake_quant(4, signed=False, observer="histogram") for _ in range(2))
    quant.watch(noise())
    quant.settle()
    loaded.load_state_dict(earlier_state(quant))
    loaded.settle()
    assert loaded.scale.equal(quant.scale)
    assert loaded.zero_point.equal(quant.zero_point)
    assert "observer.histogram" not in quant.state_dict()


def test_a_state_with_other_channels_is_refused() -> None:
    quant = make_fake_quant(4, signed=True, channels=3)
    quant.watch(torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_fake_quant(4, signed=True, channels=2).load_state_dict(earlier_state(quant))


def test_unknown_observers_are_refused() -> None:
    with pytest.raises(
        ValueError, match="running_minmax, moving_average, least_squares, histogram"
    ):
        make_observer("median", 0, 7)
    with pytest.raises(
        ValueError, match=r"choose one of minmax, running_minmax, moving_average, least_squares$"
    ):
        make_observer("histogram", 0, 7, channels=3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("data", ["normal", "laplace", "one outlier"])
def test_ranges_of_weights_are_cut_where_the_squared_error_is_least(data: str, bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows = torch.stack([DATA[data]()[:5000], 3 * noise(seed=7, count=5000)])
    if data == "one outlier":
        rows[0, -1] = 100
    quant = make_fake_quant(bits, signed=True, symmetric=True, channels=2, observer="least_squares")
    rounded = quant(rows)
    largest = rows.abs().amax(1)
    for row, got, end in zip(rows, rounded, largest, strict=True):
        scales = end * torch.arange(1, 501) / 500 / ((high - low) / 2)
        best = min(squared_error(row, float(scale), 0, low, high) for scale in scales)
        error = (got.double() - row.double()).square().sum().item()
        if data == "one outlier":  # its best share is below the smallest that is tried
            best = squared_error(row, float(end / ((high - low) / 2)), 0, low, high)
        assert error <= 1.02 * best


def test_one_range_of_a_tensor_is_cut_like_a_channel() -> None:
    x = laplace()
    whole = make_fake_quant(3, signed=True, symmetric=True, observer="least_squares")
    channel = make_fake_quant(3, signed=True, symmetric=True, channels=1, observer="least_squares")
    assert torch.equal(whole(x), channel(x[None])[0])


def test_a_training_sets_the_least_squares_range_by_one_batch() -> None:
    torch.manual_seed(0)
    quant, alone = (make_fake_quant(3, signed=False, observer="histogram").train() for _ in "ab")
    x, y = torch.rand(1000), 3 * torch.rand(1000)
    quant(x)
    first = quant.scale.clone()
    assert (quant(x) - x).square().mean() < 0.02
    quant(y)
    assert torch.equal(quant.scale, first)
    quant.is_due = True
    alone(y)
    quant(y)
    assert torch.equal(quant.scale, alone.scale)  # x is forgotten
    quant.is_due = quant.frozen = True
    quant(x)
    assert torch.equal(quant.scale, alone.scale)


def test_a_calibration_sets_the_least_squares_range_by_all_batches() -> None:
    quant, whole = (make_fake_quant(3, signed=False, observer="histogram").train() for _ in "ab")
    x = torch.rand(1000)
    quant.enabled = False
    for batch in x.split(250):
        quant(batch)
    quant.settle()
    whole(x)
    assert torch.equal(quant.scale, whole.scale)
