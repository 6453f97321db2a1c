"""The sets of a suite, and its metrics of hand-made predictions."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bqnn.data import build_data
from bqnn.data.base import TensorData
from bqnn.evaluation.figures import draw_suite
from bqnn.evaluation.results import level_rows, write_curves, write_uncertainty
from bqnn.evaluation.suite import judge, make_sets
from bqnn.evaluation.tables import suite_table
from bqnn.inference.likelihoods import Classification, Regression
from bqnn.inference.predictions import Prediction

ALL = {"splits": ["train", "val", "test"], "ood": None, "distortions": ["rotation", "blur"]}
LETTERS = Classification("ab")


def ready(dataset: str, **options: object) -> TensorData:
    data = build_data(dataset, data_dir="", seed=0, options=options)
    data.setup()
    return data


def sure_of(*probabilities: float) -> Tensor:
    """Return one draw with this probability of the first of two classes in each row."""
    first = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([first.log(), (1 - first).log()], -1)[None]


def by_hand() -> dict[str, Prediction]:
    targets = torch.tensor([0, 0, 1])
    predictions = {
        "test": Prediction(LETTERS, sure_of(0.9, 0.8, 0.6), targets),
        "ood/noise": Prediction(LETTERS, sure_of(0.5, 0.7)),
    }
    for level in range(1, 6):
        samples = sure_of(0.9, 0.9 if level < 3 else 0.1, 0.6)
        predictions[f"shift/rotation_{level}"] = Prediction(LETTERS, samples, targets)
    return predictions


def test_images_have_every_kind_of_set():
    data = ready("digits")
    sets = make_sets(data, ALL)
    levels = [f"shift/{kind}_{level}" for kind in ("rotation", "blur") for level in range(1, 6)]
    assert list(sets) == ["train", "val", "test", "ood/uniform", "ood/inverted", *levels]
    assert all(torch.equal(sets[name].targets, data.test.targets) for name in levels)
    assert not torch.equal(sets["shift/blur_5"].inputs, sets["shift/blur_1"].inputs)


def test_tables_have_no_distortions_and_val_needs_rows():
    data = ready("synthetic", validation_share=0.0)
    assert list(make_sets(data, ALL)) == ["train", "test", "ood/out_of_range"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": ["train"]}, "include test"),
        ({"splits": ["test", "dev"]}, "choose among train, val and test"),
        ({"ood": ["svhn"]}, "no set 'svhn'"),
        ({"distortions": ["twist"]}, "no 'twist'; choose among rotation"),
    ],
)
def test_a_set_that_there_is_not_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_sets(ready("digits"), ALL | change)


def test_metrics_of_a_hand_case():
    metrics = judge(by_hand()).metrics
    assert metrics["test/error"] == pytest.approx(1 / 3)
    assert metrics["test/aurc_entropy"] == pytest.approx((0 + 0 + 1 / 3) / 3)
    # The one error is the least certain row of the test set, and the most certain one at level 3.
    assert metrics["test/augrc_entropy"] == pytest.approx((1 / 3) ** 2 / 2)
    assert metrics["test/fpr95_error_entropy"] == 0
    assert metrics["shift/rotation_3/fpr95_error_mi"] == 1
    assert "ood/noise/fpr95_error_entropy" not in metrics
    assert metrics["shift/rotation_2/error"] == pytest.approx(1 / 3)
    assert metrics["shift/rotation_3/error"] == pytest.approx(2 / 3)
    assert metrics["shift/rotation_mean/error"] == pytest.approx((2 / 3 + 3 * 2 / 3) / 5)
    # Of the six pairs of a test row and a noise row, (0.6, 0.7) alone is the wrong way round.
    assert metrics["ood/noise/auroc_entropy"] == pytest.approx(5 / 6)
    assert metrics["ood/noise/auroc_max_probability"] == pytest.approx(5 / 6)
    assert metrics["ood/noise/auroc_mi"] == 0.5
    uncertain = (math.log(2) - 0.7 * math.log(0.7) - 0.3 * math.log(0.3)) / 2
    assert metrics["ood/noise/ape"] == pytest.approx(uncertain)
    assert "ood/noise/error" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())


def test_written_files_agree_with_each_other(tmp_path: Path):
    predictions = by_hand()
    findings = judge(predictions, convergence=True)
    metrics = findings.metrics
    write_curves(tmp_path, findings)
    write_uncertainty(tmp_path, predictions)

    with (tmp_path / "shift_rotation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["level"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert [float(row["amount"]) for row in rows] == [0, 15, 30, 45, 60, 75]
    assert float(rows[0]["error"]) == metrics["test/error"]
    assert float(rows[3]["nll"]) == metrics["shift/rotation_3/nll"]

    with (tmp_path / "risk_coverage.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["coverage"]) for row in rows] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [float(row["risk_entropy"]) for row in rows] == pytest.approx([0, 0, 1 / 3])

    arrays = np.load(tmp_path / "uncertainty.npz")
    np.testing.assert_allclose(arrays["test/probabilities"][:, 0], [0.9, 0.8, 0.6], rtol=1e-6)
    parts = arrays["test/aleatoric"] + arrays["test/mutual_information"]
    np.testing.assert_allclose(parts, arrays["test/entropy"], rtol=1e-6)
    assert arrays["test/targets"].tolist() == [0, 0, 1]
    assert "ood/noise/targets" not in arrays

    names = {path.name for path in draw_suite(tmp_path, findings)}
    assert names == {"risk_coverage.png", "shift.png", "ood.png", "convergence.png"}
    lines = suite_table(metrics).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["test", "ood/noise", "shift/rotation_mean"]
    assert "0.3333" in lines[1]


def test_levels_start_from_the_test_images():
    metrics = {"test/error": 0.1} | {f"shift/brightness_{n}/error": n / 10 for n in range(1, 6)}
    rows = level_rows(metrics, "brightness")
    assert [row["amount"] for row in rows] == [1, 1.5, 2, 2.5, 3, 3.5]
    assert [row["error"] for row in rows] == [0.1, 0.1, 0.2, 0.3, 0.4, 0.5]


def test_risk_of_a_regression_is_the_squared_error_in_original_units():
    houses = Regression(target_mean=10.0, target_std=2.0)
    # Means 0, 1 and log variances 0, -1: the second row is surer, and off by one, so by 2.
    samples = torch.tensor([[[0.0, 0.0], [1.0, -1.0]]])
    each = Prediction(houses, samples, torch.tensor([0.0, 2.0]))
    curves = judge({"test": each}).risk
    assert curves["std"].tolist() == pytest.approx([4, 2])
