"""Results of a run: finite metrics, numbers that fit a table, and complete files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bqnn.evaluation.results import require_results, write_metrics, write_predictions
from bqnn.evaluation.tables import split_table
from bqnn.inference.likelihoods import Regression
from bqnn.inference.metrics import NotFiniteError
from bqnn.inference.predictions import Prediction, score, score_uncertainty, with_non_finite

NAN, INF = float("nan"), float("inf")


def test_a_metric_that_is_not_finite_costs_no_other_one(tmp_path: Path) -> None:
    metrics = {"test/rmse": 1e150, "test/nll": INF, "val/nll": NAN, "num_samples": 20}
    write_metrics(tmp_path, metrics)
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept == {"test/rmse": 1e150, "num_samples": 20.0}
    with pytest.raises(ValueError, match=r"test/nll is inf, val/nll is nan: .") as error:
        require_results(tmp_path, metrics, ["metrics.json"])
    assert "\n" not in str(error.value)
    require_results(tmp_path, kept, ["metrics.json", tmp_path / "metrics.json"])


def test_missing_files_of_a_job_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.ckpt is missing"):
        require_results(tmp_path, {}, ["checkpoint.ckpt"])
    with pytest.raises(FileNotFoundError, match="no epoch was validated while it trained"):
        require_results(tmp_path, {}, ["best.ckpt"])


def test_metrics_that_are_finite_come_with_those_that_are_not() -> None:
    samples, targets = torch.zeros(2, 3, 2), torch.zeros(3)
    likelihood = Regression(0.0, 1.0)
    whole = score(Prediction(likelihood, samples, targets))
    samples[:, 1, 1] = 1000.0  # a log variance
    with pytest.raises(NotFiniteError, match=r"^nll: 1 of 3 rows are not finite"):
        score(Prediction(likelihood, samples, targets))
    found = with_non_finite(score, Prediction(likelihood, samples, targets))
    assert found.keys() == whole.keys()
    assert found["rmse"] == 0.0
    assert found["nll"] == INF
    assert not math.isfinite(likelihood.convergence(samples, targets)[-1]["nll"])


def test_uncertainty_in_original_units_needs_no_square_of_them() -> None:
    samples = torch.zeros(2, 3, 2)
    far, near = (Regression(0.0, std) for std in (1e200, 1.0))
    found, unit = (score_uncertainty(Prediction(each, samples)) for each in (far, near))
    for name, value in unit.items():
        assert found[name] == pytest.approx(1e200 * value)


def test_the_mean_of_large_predictions_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bqnn.evaluation.results.MAX_PREDICTION_BYTES", 0)
    large = Prediction(Regression(0.0, 1.0), torch.full((3, 2, 2), 3e38), torch.zeros(2))
    write_predictions(tmp_path, large)
    assert np.load(tmp_path / "predictions.npz")["mean"] == pytest.approx(3e38)


def test_large_numbers_fit_their_columns() -> None:
    lines = split_table({"test/rmse": 1e150, "test/nll": -0.5, "val/rmse": 2.0}, ["val", "test"])
    assert {len(line) for line in lines.splitlines()} == {44}
    assert "1.000e+150" in lines
