"""Learned ranges: the gradient of LSQ, and a grid that training changes and freezing keeps."""

import copy

import pytest
import torch
from torch import nn

from bqnn.layers.bayes import to_bayes
from bqnn.layers.markers import Enter, Leave, RangeParameter
from bqnn.quant.fake_quant import make_fake_quant
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import convert
from bqnn.quant.learned import LearnedFakeQuant, round_to_learned
from bqnn.quant.observers import make_observer
from bqnn.quant.quantize import prepare_qat
from bqnn.quant.simulated import freeze, prepare
from bqnn.quant.spec import QuantSpec
from bqnn.quant.summary import disagreements, sizes


@pytest.mark.parametrize(("ends", "zero_point"), [((-4, 3), 0), ((0, 7), 0), ((0, 7), 2)])
def test_the_gradient_is_that_of_the_paper(ends: tuple[int, int], zero_point: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([[0.3], [0.2], [1.1]], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 40, dtype=torch.float64)
    zero_points = torch.full((3, 1), zero_point)
    out = round_to_learned(x, scale, zero_points, ends, count=40)
    out.backward(grad)
    below, above = zero_point - ends[0], ends[1] - zero_point  # Q_n and Q_p
    expected, inside = torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, 40)
    for row in range(3):
        for column in range(40):
            v = (x[row, column] / scale[row, 0]).item()
            level = min(max(round(v), -below), above)
            inside[row, column] = level == round(v)
            slope = level - v if level == round(v) else level
            assert out[row, column].item() == pytest.approx(level * scale[row, 0].item())
            expected[row] += slope * grad[row, column] / (40 * above) ** 0.5
    assert scale.grad is not None
    assert x.grad is not None
    assert torch.allclose(scale.grad, expected)
    assert torch.equal(x.grad, grad * inside)


def test_the_scale_is_trained_and_stays_positive() -> None:
    torch.manual_seed(0)
    observer = make_observer("minmax", -2, 1, symmetric=True, channels=2)
    quant = LearnedFakeQuant(observer, -2, 1, 2, per_row=False).train()
    x = torch.randn(2, 500)
    first = (quant(x) - x).square().mean().item()
    start = quant.scale.clone()
    optimizer = torch.optim.Adam(quant.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        error = (quant(x) - x).square().sum()
        error.backward()
        optimizer.step()
    assert (quant.scale < start).all()
    assert (quant.scale > 0).all()
    assert (quant(x) - x).square().mean() < 0.5 * first
    assert torch.equal(quant.zero_point, torch.zeros(2, dtype=torch.int32))
    with torch.no_grad():
        quant.log_scale.fill_(-50.0)
    assert (quant(x).abs() < 1e-15).all()


def test_the_first_batch_sets_the_range_and_freezing_keeps_it() -> None:
    plain = make_fake_quant(4, signed=False, observer="histogram").train()
    learned = LearnedFakeQuant(make_observer("histogram", 0, 15), 0, 15, None, per_row=True).train()
    x = torch.rand(20, 5)
    plain.watch(x)
    plain.settle()
    assert torch.allclose(learned(x), plain(x))
    learned(3 * x)  # no observation
    assert torch.allclose(learned.scale, plain.scale)
    with torch.no_grad():
        learned.log_scale.add_(1.0)
    learned.eval()
    assert torch.allclose(learned.scale, plain.scale)  # that of the last training batch
    learned.train()
    learned.frozen = True
    learned(x.requires_grad_()).sum().backward()
    assert learned.log_scale.grad is None
    assert torch.allclose(learned.scale, plain.scale)


@pytest.mark.parametrize("strategy", ["both", "parameters", "weights"])
@pytest.mark.parametrize("is_bayesian", [False, True])
def test_int8_computes_the_trained_integers(is_bayesian: bool, strategy: str) -> None:
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(
        Enter(), nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    )
    net.append(Leave())
    if is_bayesian:
        net = to_bayes(net, prior_std=0.3, init_rho=-4.0)
    spec = QuantSpec(
        weight_bits=3,
        activation_bits=4,
        ranges="learned",
        strategy=strategy,
        activation_observer="histogram",
    )
    made = prepare(fuse(net), spec).train()
    ranges = [p for p in made.parameters() if isinstance(p, RangeParameter)]
    optimizer, x = torch.optim.Adam(made.parameters(), lr=1e-2), torch.randn(32, 1, 6, 6)
    made(x)
    before = [param.detach().clone() for param in ranges]
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(x), torch.arange(32) % 3).backward()
        optimizer.step()
    assert all((a != b).any() for a, b in zip(before, ranges, strict=True))
    freeze(made)
    made.eval()
    found = disagreements(made, convert(copy.deepcopy(made)), x)
    assert all(each.differing == 0 for each in found.values())
    if is_bayesian and strategy == "both":
        grids = made[1].grids
        assert torch.equal(grids.weight.scale, grids.mean.scale)


def test_scales_are_no_weights() -> None:
    net = nn.Sequential(nn.Linear(100, 10))
    counts = [
        sizes(prepare_qat(net, QuantSpec(ranges=ranges)).eval())["float_bytes"]
        for ranges in ("observed", "learned")
    ]
    assert counts == [4040, 4040]


def test_a_calibration_learns_no_ranges() -> None:
    options = {"mode": "ptq", "ranges": "learned"}
    with pytest.raises(ValueError, match=r"quant\.ranges=learned.*quant\.mode=ptq trains nothing"):
        QuantSpec.from_config(options)
