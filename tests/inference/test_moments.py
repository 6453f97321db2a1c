"""A single pass: the moments of outputs, draws from them, and the factor of their variances."""

import pytest
import torch
from torch import nn

from bqnn.inference.likelihoods import Classification, Regression
from bqnn.inference.moments import MomentNetwork, SinglePass, draws_from, fit_factor
from bqnn.inference.predict import predictive
from bqnn.layers.bayes import to_bayes
from bqnn.layers.moments import Moments
from tests.inference.test_threads import make
from tests.quant.conftest import float_net, inputs

DIGITS = Classification([str(digit) for digit in range(10)])


class Squared(nn.Module):
    """Calls a function without moments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).square()


@pytest.mark.parametrize("numeric", ["float", "simulated"])
@pytest.mark.parametrize("net", ["mlp", "lenet", "resnet"])
@pytest.mark.parametrize("method", ["bbb", "mcdropout"])
def test_outputs_have_about_the_moments_of_draws(method: str, net: str, numeric: str) -> None:
    made, x = make(method, net, numeric), inputs(net, 20)
    found = MomentNetwork(made)(x)
    draws = predictive(made, x, 200)
    spread = draws.std(0)
    assert (found.mean - draws.mean(0)).abs().mean() < 0.5 * spread.mean()
    assert found.variance is not None
    ratio = found.variance.mean().sqrt() / spread.square().mean().sqrt()
    assert 0.3 < ratio < 1.3


@pytest.mark.parametrize("method", ["bbb", "mcdropout"])
def test_the_factor_gives_the_mutual_information_of_draws(method: str) -> None:
    net = make(method, "lenet", "float")
    x, others = inputs("lenet", 200), inputs("lenet", 400)[200:]
    single_pass = SinglePass(net, DIGITS)
    single_pass.fit(x)
    wanted = DIGITS.summary(predictive(net, others, 100))["mutual_information"].mean().item()
    found = DIGITS.summary(single_pass.predict(others, 100))["mutual_information"].mean().item()
    assert found == pytest.approx(wanted, rel=0.15)


def test_a_linear_network_needs_no_factor() -> None:
    torch.manual_seed(0)
    net = to_bayes(nn.Sequential(nn.Linear(3, 2)), prior_std=1.0, init_rho=-1.0).eval()
    single_pass = SinglePass(net, Regression(0.0, 1.0))
    single_pass.fit(torch.randn(300, 3))
    assert single_pass.factor is not None
    assert 0.4 < single_pass.factor < 2.5


def test_a_network_without_noise_in_its_weights_keeps_its_outputs() -> None:
    net = to_bayes(float_net("pointwise", "lenet"), prior_std=1.0, init_rho=-60.0).eval()
    x = inputs("lenet", 10)
    found = MomentNetwork(net)(x)
    assert torch.allclose(found.mean, predictive(net, x, 1)[0], atol=1e-4)
    assert found.variance is not None
    assert found.variance.max() < 1e-8


def test_batches_and_other_rows_do_not_matter() -> None:
    network, x = MomentNetwork(make("bbb", "lenet", "float")), inputs("lenet", 20)
    whole = network(x)
    for part in (network(x, batch_size=7), network(x.flip(0)).each(lambda rows: rows.flip(0))):
        assert torch.allclose(part.mean, whole.mean, atol=1e-5)
        assert torch.allclose(part.known_variance(), whole.known_variance(), rtol=1e-4)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 100])
def test_draws_spread_as_the_moments_do(num_samples: int) -> None:
    moments = Moments(torch.randn(4, 3), torch.rand(4, 3))
    draws = draws_from(moments, num_samples, factor=2.0)
    assert draws.shape == (num_samples, 4, 3)
    assert torch.equal(draws, draws_from(moments, num_samples, factor=2.0))
    if num_samples > 1:
        assert torch.allclose(draws.mean(0), moments.mean, atol=1e-5)
        variance = 2 * moments.known_variance()
        assert torch.allclose(draws.var(0, correction=0), variance, rtol=1e-4)


def test_a_factor_of_a_regression_matches_the_variance_of_means() -> None:
    moments = Moments(torch.zeros(50, 2), torch.ones(50, 2))
    draws = draws_from(moments, 20, seed=1, factor=4.0)
    assert fit_factor(Regression(3.0, 2.0), moments, draws) == pytest.approx(4 * 20 / 19, rel=0.01)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (make("pointwise", "mlp", "float"), "the network has no random weights and no dropout"),
        (make("sghmc", "mlp", "float"), "the draws of an ensemble are its members"),
        (make("bbb", "mlp", "int8"), "an int8 network has no moments; choose numeric=simulated"),
        (
            to_bayes(nn.Sequential(nn.Linear(3, 2), nn.Tanh())).eval(),
            r"1 is .*Tanh, whose moments are not known; choose predictive=draws",
        ),
        (to_bayes(Squared()).eval(), "square, which the network calls, has no moments"),
    ],
)
def test_networks_without_moments_are_refused(net: nn.Module, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"predictive=moments: {message}") as refusal:
        MomentNetwork(net)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.MaxPool2d(2, ceil_mode=True)], "1: max pooling with dilation, ceil_mode or indices"),
        ([nn.AdaptiveAvgPool2d(2)], "1: average pooling over windows of different sizes"),
    ],
)
def test_a_layer_that_is_refused_in_a_pass_is_named(layers: list[nn.Module], message: str) -> None:
    net = to_bayes(nn.Sequential(nn.Conv2d(1, 2, 3), *layers)).eval()
    with pytest.raises(TypeError, match=f"predictive=moments: {message}"):
        MomentNetwork(net)(torch.zeros(1, 1, 7, 7))


def test_a_sum_with_a_constant_is_refused() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + 1

    with pytest.raises(TypeError, match="a sum with a constant has no moments; choose"):
        MomentNetwork(to_bayes(Shifted()).eval())(torch.zeros(1, 3))
