"""Functional metrics against hand-computed cases and other libraries."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from bqnn.inference.functional import (
    brier_score,
    calibration_bins,
    entropy,
    gaussian_nll,
    interval_coverage,
    log_mean_exp,
    mutual_information,
    risk_coverage,
)


def gaussian_draws(num_samples: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return means and log variances [S, N], and targets [N], in float64."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, num_samples, num_rows, generator=generator, dtype=torch.float64)
    targets = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    return draws[0], draws[1], targets


def test_log_mean_exp_survives_values_that_exp_does_not():
    assert log_mean_exp(torch.tensor([-2000.0, -2000.0])) == -2000
    assert log_mean_exp(torch.tensor([1000.0, -math.inf])) == 1000 - math.log(2)


def test_entropy_of_uniform_is_log_of_the_classes_and_of_one_hot_is_zero():
    probabilities = torch.tensor([[0.25] * 4, [0.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(entropy(probabilities), torch.tensor([math.log(4), 0.0]))


def disagreement(draws: Tensor) -> Tensor:
    return mutual_information(draws.mean(0), entropy(draws).mean(0))


def test_draws_that_are_sure_and_disagree_share_log_two_nats():
    draws = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])
    torch.testing.assert_close(disagreement(draws), torch.tensor([math.log(2), 0.0]))


def test_one_draw_has_no_mutual_information_and_none_is_negative():
    draws = torch.randn(20, 50, 7).softmax(-1)
    assert (disagreement(draws[:1]) == 0).all()
    assert (disagreement(draws[:1].expand(20, -1, -1)) >= 0).all()


def test_brier_score_of_a_hand_case():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    expected = torch.tensor([0.3**2 + 0.2**2 + 0.1**2, 0.0, 2.0])
    torch.testing.assert_close(brier_score(probabilities, torch.tensor([0, 2, 1])), expected)


def test_calibration_error_of_a_hand_case():
    # Five bins. Rows, by bin:
    #   (0.0, 0.2]: none
    #   (0.2, 0.4]: 0.3 wrong, 0.4 right -> confidence 0.35, accuracy 0.5, gap 0.15, 2 rows
    #   (0.4, 0.6]: none
    #   (0.6, 0.8]: 0.7 right            -> confidence 0.70, accuracy 1.0, gap 0.30, 1 row
    #   (0.8, 1.0]: 0.9 wrong, 1.0 right -> confidence 0.95, accuracy 0.5, gap 0.45, 2 rows
    # ECE = (2 * 0.15 + 1 * 0.30 + 2 * 0.45) / 5 = 1.5 / 5 = 0.3
    confidences = torch.tensor([0.3, 0.4, 0.7, 0.9, 1.0], dtype=torch.float64)
    correct = torch.tensor([False, True, True, False, True])
    counts, confidence, accuracy = calibration_bins(confidences, correct, num_bins=5)
    assert counts.tolist() == [0, 2, 0, 1, 2]
    assert confidence.tolist() == pytest.approx([0, 0.35, 0, 0.7, 0.95])
    assert accuracy.tolist() == [0, 0.5, 0, 1, 0.5]
    assert calibration_bins(confidences, correct, 5).error.item() == pytest.approx(0.3)


def test_confidence_one_joins_the_last_bin_and_zero_the_first():
    confidences = torch.tensor([0.0, 0.95, 1.0])
    correct = torch.tensor([False, False, True])
    assert calibration_bins(confidences, correct, 10).counts.tolist() == [1] + [0] * 8 + [2]
    # 0.95 right and 1.0 wrong share a bin: |0.975 - 0.5|. In bins of their own the error would
    # be (0.05 + 1.0) / 2 = 0.525.
    bins = calibration_bins(confidences[1:], torch.tensor([True, False]), 10)
    assert bins.error.item() == pytest.approx(0.475)


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_calibration_error_agrees_with_torchmetrics_inside_the_bins(num_bins):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(2000, 5, generator=generator).softmax(-1)
    targets = torch.randint(5, (2000,), generator=generator)
    confidences, predictions = probabilities.max(-1)
    ours = calibration_bins(confidences, predictions == targets, num_bins).error
    theirs = multiclass_calibration_error(probabilities, targets, num_classes=5, n_bins=num_bins)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_calibration_refuses_zero_bins():
    with pytest.raises(ValueError, match="num_bins=0"):
        calibration_bins(torch.ones(1), torch.ones(1), num_bins=0)


def test_gaussian_nll_is_scipys():
    means, log_variances, targets = gaussian_draws(3, 20)
    expected = -scipy.stats.norm.logpdf(targets, means, np.exp(0.5 * log_variances.numpy()))
    np.testing.assert_allclose(gaussian_nll(means, log_variances, targets), expected)


def test_coverage_on_normal_quantiles_is_the_level():
    # The targets are N(3, 2^2) at its quantiles (i + 1/2) / 1000, so every share is known.
    quantiles = scipy.stats.norm.ppf((np.arange(1000) + 0.5) / 1000, loc=3, scale=2)
    targets, levels = torch.from_numpy(quantiles), [0.1, 0.5, 0.95]
    mean, std = torch.full_like(targets, 3), torch.full_like(targets, 2)
    assert interval_coverage(mean, std, targets, levels).tolist() == pytest.approx(levels, abs=1e-9)
    halved = 2 * scipy.stats.norm.cdf(1.959964 / 2) - 1  # intervals half as wide as they should be
    narrow = interval_coverage(mean, std / 2, targets, [0.95]).item()
    assert narrow == pytest.approx(halved, abs=2e-3)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_coverage_refuses_a_level_that_has_no_interval(level):
    with pytest.raises(ValueError, match="levels"):
        interval_coverage(torch.zeros(1), torch.ones(1), torch.zeros(1), [0.5, level])


def test_risk_and_coverage_of_a_hand_case():
    scores = torch.tensor([0.9, 0.1, 0.5, 0.3])
    losses = torch.tensor([1.0, 0.0, 0.0, 1.0])
    # In the order 0.1, 0.3, 0.5, 0.9 the losses are 0, 1, 0, 1.
    expected = torch.tensor([0, 1 / 2, 1 / 3, 1 / 2], dtype=torch.float64)
    torch.testing.assert_close(risk_coverage(scores, losses), expected)


def test_rows_of_equal_score_count_as_their_average():
    scores = torch.tensor([0.2, 0.2, 0.2, 0.1])
    for losses in ([1.0, 0, 0, 0], [0, 0, 1.0, 0]):
        expected = torch.tensor([0, 1 / 6, 2 / 9, 1 / 4], dtype=torch.float64)
        torch.testing.assert_close(risk_coverage(scores, torch.tensor(losses)), expected)


def test_the_best_order_by_risk_is_that_of_the_losses_and_the_end_is_the_mean():
    losses = torch.rand(100, dtype=torch.float64)
    best, other, worst = (
        risk_coverage(scores, losses) for scores in (losses, torch.rand(100), -losses)
    )
    assert best.mean() < other.mean() < worst.mean()
    torch.testing.assert_close(torch.stack([best[-1], worst[-1]]), losses.mean().expand(2))
