"""Conformal sets: known quantiles and scores, and the promised coverage on any predictions."""

import math

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from bqnn.inference.conformal import (
    CLASS_SCORES,
    INTERVAL_SCORES,
    ClassSets,
    Intervals,
    class_scores,
    conformal_rank,
    conformal_threshold,
)
from bqnn.inference.functional import gaussian_mixture_quantile
from bqnn.inference.likelihoods import Regression

HOUSES = Regression(target_mean=20.0, target_std=3.0)
ROWS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("num_rows", "alpha", "rank"),
    [(9, 0.1, 9), (10, 0.1, 10), (19, 0.1, 18), (99, 0.1, 90), (3, 0.25, 3), (1, 0.5, 1)],
)
def test_the_rank_is_that_of_the_finite_sample(num_rows: int, alpha: float, rank: int) -> None:
    assert conformal_rank(num_rows, alpha) == rank
    scores = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0)) + 1.0
    assert conformal_threshold(scores, alpha) == rank


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_out_of_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha="):
        conformal_rank(100, alpha)


def test_too_few_rows_are_refused_with_the_number_that_is_enough() -> None:
    with pytest.raises(ValueError, match=r"8 validation rows are too few .* at least 9 rows"):
        conformal_rank(8, 0.1)
    assert conformal_rank(9, 0.1) == 9
    with pytest.raises(ValueError, match="at least 199 rows"):
        ClassSets.fit("lac", ROWS, torch.tensor([0, 1]), alpha=0.005)


def test_scores_of_two_rows_counted_by_hand() -> None:
    u = torch.tensor([0.5, 0.0], dtype=torch.float64)
    lac = [[0.5, 0.7, 0.8], [0.9, 0.3, 0.8]]
    aps = [[0.25, 0.65, 0.9], [0.9, 0.0, 0.7]]
    raps = [[0.25, 0.65, 1.0], [1.0, 0.0, 0.7]]
    for name, expected in zip(CLASS_SCORES, (lac, aps, raps), strict=True):
        torch.testing.assert_close(class_scores(name, ROWS, u), torch.tensor(expected).double())


def test_sets_have_the_classes_up_to_the_threshold() -> None:
    assert ClassSets("lac", 0.75)(ROWS).tolist() == [[True, True, False], [False, True, False]]
    assert ClassSets("lac", 0.2)(ROWS).sum() == 0  # a set may be empty
    assert ClassSets("aps", 1.0)(ROWS).all()
    assert not ClassSets("raps", 1.0)(torch.full((1, 10), 0.1)).all()


def labelled(num_rows: int, seed: int, sharpness: float = 3.0) -> tuple[Tensor, Tensor]:
    """Probabilities that are too sure, unless sharpness is 1, and labels of eight classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_rows, 8, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return (sharpness * logits).softmax(-1), targets


def measured(num_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four draws of a mean and of a variance that is too small, and targets of uneven noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    means = x + 0.2 * torch.randn(4, num_rows, generator=generator, dtype=torch.float64)
    log_variances = (2 * (0.2 + x).log() - 2).expand(4, num_rows)
    noise = (0.2 + x) * torch.randn(num_rows, generator=generator, dtype=torch.float64)
    return torch.stack([means, log_variances], -1), x + noise


@pytest.mark.parametrize("alpha", [0.1, 0.3])
@pytest.mark.parametrize("score", CLASS_SCORES)
def test_sets_cover_the_promised_share(score: str, alpha: float) -> None:
    """Within four standard deviations of the calibration and of the test rows."""
    sets = ClassSets.fit(score, *labelled(2000, seed=0), alpha)
    probabilities, targets = labelled(20_000, seed=1)
    covered = sets(probabilities).gather(1, targets[:, None]).double().mean().item()
    deviation = math.sqrt(alpha * (1 - alpha) * (1 / 2000 + 1 / 20_000))
    assert covered == pytest.approx(1 - alpha, abs=4 * deviation)


def test_lac_has_the_smallest_sets_and_raps_no_large_ones() -> None:
    sizes = {}
    for score in CLASS_SCORES:
        sets = ClassSets.fit(score, *labelled(5000, seed=0, sharpness=1), alpha=0.1)
        sizes[score] = sets(labelled(20_000, seed=1, sharpness=1)[0]).double().sum(1)
    assert sizes["lac"].mean() < 0.97 * sizes["aps"].mean()
    assert sizes["raps"].max() < sizes["aps"].max()


@pytest.mark.parametrize("alpha", [0.1, 0.3])
@pytest.mark.parametrize("score", INTERVAL_SCORES)
def test_intervals_cover_the_promised_share_in_original_units(score: str, alpha: float) -> None:
    intervals = Intervals.fit(score, HOUSES, *measured(2000, seed=0), alpha)
    draws, targets = measured(20_000, seed=1)
    lower, upper = intervals(HOUSES, draws).unbind(-1)
    houses = 20 + 3 * targets
    covered = ((lower <= houses) & (houses <= upper)).double().mean().item()
    deviation = math.sqrt(alpha * (1 - alpha) * (1 / 2000 + 1 / 20_000))
    assert covered == pytest.approx(1 - alpha, abs=4 * deviation)


def test_intervals_of_one_gaussian_are_known() -> None:
    draws = torch.tensor([0.0, 2 * math.log(2)], dtype=torch.float64).expand(1, 9, 2)
    targets = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, 9], dtype=torch.float64)
    one = draws[:, :1]
    normalized = Intervals.fit("normalized", HOUSES, draws, targets, alpha=0.2)
    assert normalized.threshold == 8 / 2  # the 8th of 9 residuals, in standard deviations
    assert normalized(HOUSES, one)[0].tolist() == pytest.approx([20 - 3 * 8, 20 + 3 * 8])
    cqr = Intervals.fit("cqr", HOUSES, draws, targets, alpha=0.2)
    assert cqr.threshold == pytest.approx(8 - 2 * norm.ppf(0.9))
    assert cqr(HOUSES, one)[0].tolist() == pytest.approx([20 - 3 * 8, 20 + 3 * 8])
    far = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)  # narrower: the same length is added
    half = norm.ppf(0.9) + cqr.threshold
    expected = [20 + 3 * (1 - half), 20 + 3 * (1 + half)]
    assert cqr(HOUSES, far)[0].tolist() == pytest.approx(expected)


def test_quantiles_of_a_mixture_have_the_probability_below_them() -> None:
    draws, _ = measured(50, seed=0)
    means, variances = 5 * draws[..., 0], draws[..., 1].exp()
    for level in (0.05, 0.5, 0.95):
        quantile = gaussian_mixture_quantile(means, variances, level)
        below = norm.cdf((quantile - means) / variances.sqrt()).mean(0)
        assert below.tolist() == pytest.approx([level] * 50, abs=1e-12)


def test_the_same_rows_have_the_same_sets() -> None:
    probabilities, targets = labelled(500, seed=0)
    sets = ClassSets.fit("aps", probabilities, targets, alpha=0.1)
    assert ClassSets.fit("aps", probabilities, targets, alpha=0.1) == sets
    assert torch.equal(sets(probabilities), sets(probabilities))


def test_scores_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="score='tps': choose lac, aps, raps"):
        ClassSets.fit("tps", ROWS, torch.tensor([0, 1]), alpha=0.5)
    with pytest.raises(ValueError, match="score='lac': choose normalized, cqr"):
        Intervals.fit("lac", HOUSES, *measured(9, seed=0), alpha=0.1)
