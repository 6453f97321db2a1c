"""Mixtures of draws against scipy, and equal mixtures from running means."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from bqnn.inference.functional import gaussian_nll
from bqnn.inference.mixtures import CategoricalMixture, GaussianMixture


def classified() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 20, 3, generator=generator), torch.arange(20) % 3


def regressed(num_samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(num_samples, 20, 2, generator=generator, dtype=torch.float64)
    return draws, torch.randn(20, generator=generator, dtype=torch.float64)


def test_probabilities_and_entropies_are_scipys() -> None:
    draws, targets = classified()
    mixture = CategoricalMixture.of(draws, targets)
    each = scipy.special.softmax(draws.double().numpy(), axis=-1)
    np.testing.assert_allclose(mixture.probabilities, each.mean(0))
    np.testing.assert_allclose(mixture.expected_entropy, scipy.stats.entropy(each, axis=-1).mean(0))
    likelihood = each.mean(0)[range(20), targets]
    np.testing.assert_allclose(mixture.log_likelihood, np.log(likelihood))


def test_moments_are_those_of_the_mixture() -> None:
    # Draws N(1, 1) and N(3, 4): mean 2, variance of the means 1, mean of the variances 2.5.
    mixture = GaussianMixture.of(torch.tensor([[[1.0, 0.0]], [[3.0, math.log(4)]]]))
    assert mixture.mean == 2
    assert mixture.epistemic == 1
    assert mixture.aleatoric.item() == pytest.approx(2.5)
    assert mixture.variance.item() == pytest.approx(3.5)


def test_moments_of_one_draw_are_its_own() -> None:
    draws, _ = regressed(1)
    mixture = GaussianMixture.of(draws)
    assert mixture.mean.equal(draws[0, :, 0])
    assert mixture.variance.equal(draws[0, :, 1].exp())


def test_mixture_density_is_scipys_and_of_one_draw_the_gaussian() -> None:
    draws, targets = regressed()
    means, log_variances = draws.unbind(-1)
    log_density = scipy.stats.norm.logpdf(targets, means, np.exp(0.5 * log_variances.numpy()))
    expected = scipy.special.logsumexp(log_density, axis=0, b=1 / 6)
    np.testing.assert_allclose(GaussianMixture.of(draws, targets).log_likelihood, expected)
    one = GaussianMixture.of(draws[:1], targets).log_likelihood
    torch.testing.assert_close(one, -gaussian_nll(means[0], log_variances[0], targets))


@pytest.mark.parametrize(
    ("kind", "draws", "targets"),
    [(CategoricalMixture, *classified()), (GaussianMixture, *regressed())],
)
def test_running_mixtures_are_those_of_the_first_draws(kind, draws, targets) -> None:
    running = list(kind.running(draws, targets))
    assert len(running) == len(draws)
    for count, mixture in enumerate(running, 1):
        expected = kind.of(draws[:count], targets)
        for name, values in vars(expected).items():
            torch.testing.assert_close(getattr(mixture, name), values, rtol=1e-12, atol=1e-12)


def test_a_mixture_is_returned_as_it_is() -> None:
    mixture = CategoricalMixture.of(*classified())
    assert CategoricalMixture.of(mixture) is mixture
