"""However a training ends, its results are complete, or the job reports what is missing."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bqnn.checkpoints.file import read_checkpoint
from bqnn.evaluation.results import require_results

ScriptHere = Callable[..., tuple[int, str]]
QUICK = ["task=synthetic", "method=pointwise", "logger=none", "plots=false", "task.batch_size=50"]
QUICK += ["trainer.save_every=1000"]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def logged_epochs(folder: Path) -> list[int]:
    with (folder / "metrics.csv").open() as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "limit", ["+trainer.max_steps=13", "+trainer.max_time=00:00:00:01", "task.max_epochs=2"]
)
def test_the_last_epoch_is_saved_logged_and_drawn_however_it_came(
    limit: str, script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [*QUICK, "plots=true", "task.max_epochs=100000", limit, "hydra.run.dir=run"]
    arguments += ["trainer.check_val_every_n_epoch=50000"]
    code, errors = script_here("train", *arguments)
    assert code == 0, errors
    assert status(tmp_path / "run")["state"] == "DONE"
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoint.ckpt")
    assert logged_epochs(tmp_path / "run") == [checkpoint["epoch"]]
    assert (tmp_path / "run" / "curves.png").exists()
    if "max_steps" in limit:
        assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, 13)


@pytest.mark.parametrize(
    "limit",
    ["trainer.limit_train_batches=0", "+trainer.max_steps=0", "+trainer.max_time=00:00:00:00"],
)
def test_a_training_without_a_step_is_refused(
    limit: str, script_here: ScriptHere, tmp_path: Path
) -> None:
    code, errors = script_here("train", *QUICK, limit, "hydra.run.dir=run")
    assert code == 1
    (line,) = errors.strip().splitlines()
    assert limit.strip("+").partition("=")[0] in line
    assert "choose a whole number from 1" in line or "more than zero" in line
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("trainer.check_val_every_n_epoch=301", "no epoch would be validated, since"),
        ("task.validation_share=0", "no validation rows"),
        ("+trainer.limit_val_batches=0", "trainer.limit_val_batches=0: leave it out"),
        ("+trainer.fast_dev_run=true", "trainer=smoke is a short run"),
        ("+trainer.limit_test_batches=0.5", "trainer.limit_test_batches=0.5: leave it out"),
    ],
)
def test_options_that_prevent_a_requested_file_are_refused_before_training(
    option: str, said: str, script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [*QUICK, "trainer.save_best=true", option, "hydra.run.dir=run"]
    code, errors = script_here("train", *arguments)
    assert code == 1
    (line,) = errors.strip().splitlines()
    assert said in line
    assert not (tmp_path / "run" / "checkpoint.ckpt").exists()


def test_a_best_epoch_that_never_was_fails_the_job_and_keeps_the_rest(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [*QUICK, "trainer.save_best=true", "+trainer.max_steps=5", "hydra.run.dir=run"]
    code, errors = script_here("train", *arguments)
    assert code == 1
    assert "best.ckpt is missing: no epoch was validated" in errors
    assert status(tmp_path / "run")["state"] == "FAILED"
    assert "test/nll" in json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (tmp_path / "run" / "checkpoint.ckpt").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        # 1,290 rows to train on; the last block sees them without a position.
        ["task.batch_size=1289"],
        ["task.batch_size=1"],
    ],
)
def test_batch_norm_that_would_see_one_value_is_refused_before_training(
    arguments: list[str], script_here: ScriptHere, tmp_path: Path
) -> None:
    small = ["task=digits", "net=resnet", "net.width=8", "logger=none", "plots=false"]
    code, errors = script_here("train", *small, *arguments, "hydra.run.dir=run")
    assert code == 1
    (line,) = errors.strip().splitlines()
    assert f"{arguments[0]}: " in line
    suggested = int(line.partition("choose task.batch_size=")[2].partition(",")[0])
    assert suggested > 1
    assert 1290 % suggested != 1
    assert not (tmp_path / "run" / "checkpoint.ckpt").exists()


def test_one_row_with_many_positions_is_trained_on(script_here: ScriptHere, tmp_path: Path) -> None:
    """LeNet has no batch norm; the ResNet's last batch, of one row, is not used."""
    small = ["task=digits", "logger=none", "plots=false", "trainer.max_epochs=1"]
    few = ["task.batch_size=1289", "trainer.limit_train_batches=1"]
    assert script_here("train", *small, "task.batch_size=1289", "hydra.run.dir=lenet")[0] == 0
    resnet = ["net=resnet", "net.width=8", "method=pointwise", *few]
    code, errors = script_here("train", *small, *resnet, "hydra.run.dir=resnet")
    assert code == 0, errors


def write_table(data_dir: Path, cells: np.ndarray, num_test: int) -> None:
    folder = data_dir / "uci" / "mine" / "data"
    folder.mkdir(parents=True)
    np.savetxt(folder / "data.txt", cells)
    np.savetxt(folder / "index_features.txt", range(cells.shape[1] - 1), fmt="%d")
    np.savetxt(folder / "index_target.txt", [cells.shape[1] - 1], fmt="%d")
    np.savetxt(folder / "n_splits.txt", [1], fmt="%d")
    np.savetxt(folder / "index_test_0.txt", range(num_test), fmt="%d")
    np.savetxt(folder / "index_train_0.txt", range(num_test, len(cells)), fmt="%d")


@pytest.mark.parametrize(("scale", "target"), [(1.0, 1e30), (1e150, 1e151), (1e150, 1e188)])
def test_numbers_beyond_float32_are_measured_in_float64(
    scale: float, target: float, script_here: ScriptHere, tmp_path: Path
) -> None:
    cells = scale * np.random.default_rng(0).normal(size=(40, 3))
    cells[1, 2] = target
    write_table(tmp_path, cells, num_test=5)
    table = ["task=uci", "task.table=mine", f"data_dir={tmp_path}", "method=pointwise"]
    arguments = [*table, "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1"]
    arguments += ["trainer.save_best=true", "logger=none", "hydra.run.dir=run"]
    code, errors = script_here("train", *arguments)
    assert code == 0, errors
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test/rmse"] == pytest.approx(target / math.sqrt(5), rel=0.5)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rmse = [float(row["val/rmse"]) for row in csv.DictReader(file)]
    assert np.isfinite(rmse).all()
    assert max(rmse) < 10 * scale

    arguments = ["checkpoint=run/checkpoint.ckpt", f"data_dir={tmp_path}", "logger=none"]
    code, errors = script_here("evaluate", *arguments, "hydra.run.dir=evaluated")
    if target < 1e154:
        assert code == 0, errors
    else:  # the squared error has no float64
        assert code == 1
        assert "test/aurc_std is inf" in errors
    again = json.loads((tmp_path / "evaluated" / "metrics.json").read_text())
    assert again["test/rmse"] == pytest.approx(metrics["test/rmse"])
    kept = np.load(tmp_path / "evaluated" / "uncertainty.npz")
    assert all(np.isfinite(kept[name]).all() for name in kept.files)


def test_a_metric_that_is_not_finite_fails_the_job_and_keeps_all_else(
    script_here: ScriptHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = torch.tensor(math.nan, dtype=torch.float64)
    monkeypatch.setattr("bqnn.inference.metrics.IntervalCoverage.compute", lambda _: broken)
    code, errors = script_here("train", *QUICK, "task.max_epochs=2", "hydra.run.dir=run")
    assert code == 1
    line = errors.strip().splitlines()[-1]
    assert "val/coverage95 is nan, test/coverage95 is nan" in line
    assert status(tmp_path / "run")["state"] == "FAILED"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"val/nll", "test/nll", "test/rmse", "time/epoch_seconds"} <= metrics.keys()
    require_results(tmp_path / "run", {}, ["checkpoint.ckpt", "predictions.npz", "metrics.csv"])
