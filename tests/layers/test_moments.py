"""Moments of layers are those of many samples."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bqnn.layers.bayes import BayesConv2d, BayesLinear
from bqnn.layers.dropout import MCDropout
from bqnn.layers.markers import Add, AvgPool, Cat, Pool, SpatialMean
from bqnn.layers.moments import Moments, NoMomentsError, maximum, rectified, rule_of

COUNT = 40_000


def gaussian(*shape: int) -> Moments:
    torch.manual_seed(1)
    return Moments(torch.randn(1, *shape), torch.rand(1, *shape) + 0.1)


def sampled(x: Moments, count: int = COUNT) -> Tensor:
    assert x.variance is not None
    return x.mean + x.variance.sqrt() * torch.randn(count, *x.mean.shape[1:])


def assert_moments(found: Moments, samples: Tensor, tolerance: float = 0.05) -> None:
    mean, variance = samples.mean(0, keepdim=True), samples.var(0, keepdim=True)
    assert torch.allclose(found.mean, mean, atol=tolerance * float(variance.max().sqrt()))
    assert torch.allclose(found.known_variance(), variance, rtol=2 * tolerance, atol=5e-3)


def test_the_maximum_of_two_gaussians() -> None:
    x, y = gaussian(20), Moments(torch.zeros(1, 20), torch.full((1, 20), 0.5))
    assert_moments(maximum(x, y), torch.maximum(sampled(x), sampled(y)))


@pytest.mark.parametrize("cap", [None, 1.0])
def test_a_rectified_gaussian(cap: float | None) -> None:
    x = gaussian(20)
    # A rectified value is no Gaussian any more, so its upper bound is approximate.
    tolerance = 0.03 if cap is None else 0.3
    assert_moments(rectified(x, cap), sampled(x).clamp(0, cap), tolerance)


@pytest.mark.parametrize("far", [1e-20, 1.0, 1e6, 1e30])
def test_a_maximum_is_finite(far: float) -> None:
    x = Moments(torch.tensor([far, -far]), torch.tensor([0.0, 1.0]))
    mean, variance = maximum(x, Moments(torch.zeros(2), torch.zeros(2)))
    assert mean[0] == pytest.approx(far)
    assert variance.isfinite().all()
    assert (variance >= 0).all()


def test_values_without_noise_pass_as_usual() -> None:
    x = torch.randn(2, 3, 4, 4)
    pool, relu = nn.MaxPool2d(2), nn.ReLU()
    assert torch.equal(rule_of(pool)(Moments(x)).mean, pool(x))
    assert torch.equal(rule_of(relu)(Moments(x)).mean, relu(x))
    certain = Moments(x, torch.zeros_like(x))
    assert torch.allclose(rule_of(pool)(certain).mean, pool(x), atol=1e-6)
    assert rule_of(pool)(certain).variance.max() < 1e-10


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (BayesLinear(6, 4, prior_std=1.0, init_rho=0.0), (6,)),
        (BayesConv2d(2, 3, 3, stride=2, padding=1, prior_std=1.0, init_rho=0.0), (2, 5, 5)),
        (nn.Linear(6, 4), (6,)),
        (nn.Conv2d(2, 4, 3, groups=2, bias=False), (2, 5, 5)),
        (nn.BatchNorm2d(2), (2, 3, 3)),
        (MCDropout(0.3), (6,)),
        (nn.MaxPool2d(2), (2, 4, 4)),
        (nn.MaxPool2d(3, stride=2, padding=1), (2, 6, 6)),
        (nn.AvgPool2d(2), (2, 4, 4)),
        (AvgPool(nn.AdaptiveAvgPool2d((2, 1))), (2, 4, 4)),
        (Pool(), (2, 4, 4)),
        (SpatialMean(keepdim=True), (2, 4, 4)),
        (nn.Flatten(), (2, 4, 4)),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_layer_has_the_moments_of_samples(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    if isinstance(layer, nn.BatchNorm2d):
        layer.running_var.fill_(4.0)
        layer.weight.fill_(-3.0)
    layer.eval()
    x = gaussian(*shape)
    count = 4000
    inputs = sampled(x, count)
    if isinstance(layer, BayesLinear | BayesConv2d):  # each row needs its own weights
        outputs = torch.cat([layer(row[None]) for row in inputs])
        tolerance = 0.1
    else:
        # A maximum of nine values is less like a Gaussian than one of four.
        outputs, tolerance = layer(inputs), 0.2 if "kernel_size=3" in str(layer) else 0.1
    assert_moments(rule_of(layer)(x), outputs, tolerance)


def test_sums_and_concatenations() -> None:
    x, y = gaussian(8), Moments(torch.ones(1, 8), torch.full((1, 8), 2.0))
    first, second = sampled(x), sampled(y)
    assert_moments(rule_of(Add())(x, y), Add()(first, second))
    assert_moments(rule_of(Cat(1))(x, y), torch.cat([first, second], 1))
    without = rule_of(Add(relu=False))(x, Moments(torch.ones(1, 8)))
    assert torch.equal(without.variance, x.variance)


def correlated() -> BayesLinear:
    layer = BayesLinear(3, 2)
    layer.loadings = torch.full((1, 2, 3), 0.5)
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rule_of(nn.Sigmoid()), "Sigmoid, whose moments are not known"),
        (
            lambda: rule_of(nn.MaxPool2d(2, ceil_mode=True))(gaussian(1, 5, 5)),
            "max pooling with dilation, ceil_mode or indices has no moments",
        ),
        (
            lambda: rule_of(nn.AdaptiveAvgPool2d(2))(gaussian(1, 5, 5)),
            "average pooling over windows of different sizes has no moments",
        ),
        (
            lambda: rule_of(nn.BatchNorm2d(1, track_running_stats=False))(gaussian(1, 5, 5)),
            "batch norm without running statistics has no moments",
        ),
        (lambda: rule_of(correlated()), r"correlated weights \(low-rank SWAG\)"),
    ],
)
def test_what_has_no_moments_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(NoMomentsError, match=message):
        make()
