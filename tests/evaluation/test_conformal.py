"""Coverage and size of conformal sets of hand-made predictions."""

import pytest
import torch

from bqnn.evaluation.conformal import conformal_metrics, conformal_rows, fit_conformal
from bqnn.evaluation.suite import judge
from bqnn.inference.conformal import ClassSets, Intervals
from bqnn.inference.likelihoods import Classification, Regression
from bqnn.inference.predictions import Prediction

LETTERS = Classification("abc")
HOUSES = Regression(target_mean=10.0, target_std=2.0)


def letters() -> Prediction:
    """Sets of lac at 0.75 have 2, 1 and 2 classes, and cover all targets but the second."""
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.3, 0.1, 0.6]], dtype=torch.float64)
    return Prediction(LETTERS, rows.log()[None], torch.tensor([0, 0, 2]))


def test_coverage_and_size_of_classes_counted_by_hand() -> None:
    sets = {"lac": ClassSets("lac", 0.75)}
    assert conformal_metrics(sets, letters(), has_coverage=True) == {
        "size_lac": pytest.approx(5 / 3),
        "coverage_lac": pytest.approx(2 / 3),
        "worst_class_coverage_lac": 0.5,  # of the two rows of class a
    }
    assert list(conformal_metrics(sets, letters(), has_coverage=False)) == ["size_lac"]
    table = conformal_rows(sets, "test", letters())
    assert [(row["class"], row["rows"], row["coverage"]) for row in table] == [
        ("all", 3, pytest.approx(2 / 3)),
        ("a", 2, 0.5),
        ("c", 1, 1.0),
    ]
    assert [row["size"] for row in table] == pytest.approx([5 / 3, 1.5, 2])


def test_coverage_and_width_of_intervals_counted_by_hand() -> None:
    sets = {"normalized": Intervals("normalized", 1.5, alpha=0.2)}
    each = Prediction(HOUSES, torch.zeros(1, 4, 2), torch.tensor([0.0, 1.4, -1.6, 9.0]))
    assert conformal_metrics(sets, each, has_coverage=True) == {
        "width_normalized": 6.0,
        "coverage_normalized": 0.5,
    }
    assert [row["class"] for row in conformal_rows(sets, "test", each)] == ["all"]
    empty = Intervals("cqr", -4.0, alpha=0.2)
    assert conformal_metrics({"cqr": empty}, each, has_coverage=True)["width_cqr"] == 0


def test_a_suite_measures_coverage_where_targets_mean_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 60, 3, generator=generator)
    each = Prediction(LETTERS, rows, torch.arange(60) % 3)
    names = ["train", "val", "test", "ood/inverted", *(f"shift/blur_{n}" for n in range(1, 6))]
    findings = judge(dict.fromkeys(names, each), conformal=fit_conformal(each, alpha=0.2))
    covered = {k.rpartition("/")[0] for k in findings.metrics if "/coverage_aps" in k}
    assert covered == {"test", "shift/blur_mean", *names[4:]}
    sized = {k.rpartition("/")[0] for k in findings.metrics if "/size_aps" in k}
    assert sized == {*covered, "ood/inverted"}
    assert {row["set"] for row in findings.conformal} == {"test", *names[4:]}
    assert judge({"test": each}).conformal == []
