"""Ranking metrics against hand-counted cases and their definitions."""

import pickle

import pytest
import scipy.stats
import torch
from torch import Tensor

from bqnn.inference.functional import risk_coverage
from bqnn.inference.ranking import AUGRC, AURC, AUROC, FPR95, detection_metrics


def detection(*batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Compute the metrics of batches of familiar and unfamiliar scores."""
    metrics = detection_metrics()
    for familiar, unfamiliar in batches:
        scores = torch.cat([familiar, unfamiliar])
        metrics.update(scores, torch.arange(len(scores)) >= len(familiar))
    return {name.lower(): value.item() for name, value in metrics.compute().items()}


def test_a_perfect_detector():
    found = detection((torch.tensor([0.0, 0.1, 0.2]), torch.tensor([0.3, 0.9])))
    assert found == {"auroc": 1, "aupr": 1, "fpr95": 0}


def test_a_detector_that_is_always_wrong():
    found = detection((torch.tensor([0.8, 0.9]), torch.tensor([0.1, 0.2])))
    assert found["auroc"] == 0
    assert found["fpr95"] == 1
    # Precision 1/3 when the first of two is found, 2/4 when the second is.
    assert found["aupr"] == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_a_case_counted_by_hand():
    found = detection((torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([4.0, 6.0])))
    assert found["auroc"] == 7 / 8  # of eight pairs only (5, 4) is the wrong way round
    assert found["aupr"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["fpr95"] == 1 / 4  # to find both, 5 is flagged as well


def test_scores_that_are_all_equal_say_nothing():
    found = detection((torch.zeros(30), torch.zeros(10)))
    assert found == {"auroc": 0.5, "aupr": 0.25, "fpr95": 1}


def test_auroc_is_the_probability_of_a_higher_score_and_scores_may_be_beyond_one():
    generator = torch.Generator().manual_seed(0)
    familiar = torch.randn(300, generator=generator).mul(30).round()  # with ties
    unfamiliar = torch.randn(200, generator=generator).add(0.5).mul(30).round()
    found = detection((familiar, unfamiliar))
    wins = scipy.stats.mannwhitneyu(unfamiliar, familiar).statistic
    assert found["auroc"] == pytest.approx(wins / (300 * 200))
    thresholds = unfamiliar.sort(descending=True).values
    needed = thresholds[int(0.95 * 200) - 1]
    assert found["fpr95"] == pytest.approx((familiar >= needed).double().mean().item())


def test_infinite_scores_have_an_order_like_others():
    infinity = float("inf")
    familiar, unfamiliar = [0.0, 0.1, 0.2], [0.3, 0.9]
    expected = detection((torch.tensor(familiar), torch.tensor(unfamiliar)))
    assert detection((torch.tensor(familiar), torch.tensor([0.3, infinity]))) == expected


def test_batches_count_as_one_set_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    familiar, unfamiliar = torch.randn(2, 60, generator=generator).mul(5).round()
    pairs = zip(familiar.split(25), unfamiliar.split(25), strict=True)
    assert detection(*pairs) == detection((familiar, unfamiliar))


def test_aurc_is_the_mean_of_the_curve_over_all_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, losses = torch.rand(2, 50, generator=generator, dtype=torch.float64)
    metric = AURC()
    for some_scores, some_losses in zip(scores.split(20), losses.split(20), strict=True):
        metric.update(some_scores, some_losses)
    assert metric.curve().equal(risk_coverage(scores, losses))
    assert metric.compute() == risk_coverage(scores, losses).mean()
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.compute() == metric.compute()
    metric.reset()
    assert metric.scores == []


def test_augrc_is_its_closed_form_for_errors() -> None:
    """Traub et al. (2024): (1 - AUROC) e (1 - e) + e^2 / 2, with ties of scores, too."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, generator=generator).mul(4).round()
    is_wrong = torch.rand(300, generator=generator) < 0.3
    metric, auroc = AUGRC(), AUROC()
    for rows in torch.arange(300).split(70):
        metric.update(scores[rows], is_wrong[rows].double())
        auroc.update(scores[rows], is_wrong[rows])
    error = is_wrong.double().mean().item()
    expected = (1 - auroc.compute().item()) * error * (1 - error) + error**2 / 2
    assert metric.compute().item() == pytest.approx(expected, rel=1e-12)


def test_augrc_of_a_case_counted_by_hand() -> None:
    metric = AUGRC()
    metric.update(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([4.0, 0.0, 2.0]))
    areas = [0, (0 + 2 / 3) / 2, (2 / 3 + 6 / 3) / 2]  # of trapezoids of width 1/3
    assert metric.compute().item() == pytest.approx(sum(areas) / 3)


@pytest.mark.parametrize("is_wrong", [torch.zeros(4), torch.ones(4)])
def test_rows_of_one_kind_leave_nothing_to_detect(is_wrong: Tensor) -> None:
    metric = FPR95()
    metric.update(torch.tensor([0.1, 0.4, 0.2, 0.3]), is_wrong.bool())
    assert metric.compute() == 0


@pytest.mark.parametrize("metric", [AURC(), AUGRC(), detection_metrics()])
def test_shapes_that_would_broadcast_are_refused(metric) -> None:
    with pytest.raises(ValueError, match=r"scores of shape \[5\], .* of shape \[5, 1\]"):
        metric.update(torch.zeros(5), torch.zeros(5, 1))
