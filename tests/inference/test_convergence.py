"""R-hat and effective sample size: the values of ArviZ, and of chains whose answer is known."""

import math

import pytest
import torch
from torch import Tensor

from bqnn.inference.convergence import effective_sample_size, split_rhat


def series(num_chains: int, num_draws: int, memory: float, shift: float) -> Tensor:
    """Make autocorrelated chains from a linear congruential generator; `shift` separates them."""
    state, draws = 1, torch.zeros(num_chains, num_draws, dtype=torch.float64)
    for chain in range(num_chains):
        value = 0.0
        for draw in range(num_draws):
            state = (state * 1103515245 + 12345) % 2**31
            value = memory * value + state / 2**31 - 0.5 + shift * chain * 0.01
            draws[chain, draw] = value
    return draws


@pytest.mark.parametrize(
    ("arguments", "rhat", "ess"),
    [  # of arviz 0.21: rhat(method="rank"), ess(method="bulk")
        ((4, 50, 0.0, 0.0), 1.0022231885033823, 173.78312486643634),
        ((2, 51, 0.6, 0.0), 1.1432644252987818, 11.784109149552654),
        ((3, 40, 0.3, 10.0), 1.11990874505855, 20.388888576761904),
        ((4, 10, 0.5, 0.0), 1.5607233364459665, 14.878069471241576),
        ((2, 100, -0.4, 0.0), 1.0013606229152932, 460.2059991327962),
        ((1, 20, 0.9, 0.0), None, 8.012959737410172),  # arviz has no R-hat of one chain
    ],
)
def test_values_are_those_of_arviz(arguments, rhat, ess):
    draws = series(*arguments)
    if rhat is not None:
        assert split_rhat(draws) == pytest.approx(rhat, rel=1e-12)
    assert effective_sample_size(draws) == pytest.approx(ess, rel=1e-12)


def test_values_do_not_depend_on_a_monotone_scale_or_on_the_order_of_chains():
    draws = series(3, 30, 0.5, 2.0)
    for same in (draws.exp(), draws.flip(0)):
        assert effective_sample_size(same) == pytest.approx(effective_sample_size(draws))
    assert split_rhat(3 * draws - 7) == pytest.approx(split_rhat(draws))


def test_a_trend_and_chains_apart_are_seen():
    torch.manual_seed(0)
    noise = torch.randn(4, 100)
    assert split_rhat(noise) < 1.05
    assert split_rhat(noise + torch.linspace(0, 5, 100)) > 1.4
    assert split_rhat(noise[:1] + torch.linspace(0, 5, 100)) > 1.4
    assert split_rhat(noise * torch.tensor([[1.0], [1], [1], [20]])) > 1.1  # equal means
    # An autoregression with coefficient a has a fraction (1 - a) / (1 + a) of independent draws.
    chain = torch.zeros(4, 5000)
    for draw in range(1, 5000):
        chain[:, draw] = 0.8 * chain[:, draw - 1] + torch.randn(4)
    assert effective_sample_size(chain) == pytest.approx(20_000 / 9, rel=0.15)


def test_equal_draws_have_no_value_and_too_few_are_refused():
    assert math.isnan(split_rhat(torch.ones(2, 6)))
    assert math.isnan(effective_sample_size(torch.ones(2, 6)))
    for compute in (split_rhat, effective_sample_size):
        with pytest.raises(ValueError, match=r"^draws: they have the shape \(2, 3\); pass"):
            compute(torch.ones(2, 3))
