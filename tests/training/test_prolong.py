"""A training that is resumed with more epochs continues to the new end."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from bqnn.jobs.identity import is_prolonged

ScriptHere = Callable[..., tuple[int, str]]
COMMON = ["task=synthetic", "task.num_train=200", "logger=none", "plots=false"]
SGHMC = ["method=sghmc", "method.burn_in=1", "method.collect_every=2", "method.num_samples=2"]


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def content(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.ckpt", weights_only=True)


@pytest.mark.parametrize(
    "method",
    [["method=pointwise", "method.schedule=constant"], SGHMC, ["method=bbb", "quant=default"]],
    ids=lambda arguments: arguments[0],
)
def test_more_epochs_continue_from_the_last_checkpoint(
    method: list[str], script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [*COMMON, *method]
    run = [*arguments, "hydra.run.dir=run"]
    assert script_here("train", *run, "trainer.max_epochs=4")[0] == 0
    code, errors = script_here("train", *run, "trainer.max_epochs=7", "resume=true")
    assert code == 0, errors
    described = status(tmp_path / "run")
    assert (described["state"], described["resumed_from_epoch"]) == ("DONE", 4)
    assert content(tmp_path / "run")["epoch"] == 6
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 7
    if "method=bbb" in method:
        return  # its schedule was planned for four
    assert script_here("train", *arguments, "trainer.max_epochs=7", "hydra.run.dir=whole")[0] == 0
    ours, theirs = (content(tmp_path / name)["state_dict"] for name in ("run", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_cosine_schedule_is_stretched_with_a_warning(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    run = [*COMMON, "method=pointwise", "method.optimizer.lr=0.01", "hydra.run.dir=run"]
    assert script_here("train", *run, "task.max_epochs=4")[0] == 0
    code, errors = script_here("train", *run, "task.max_epochs=8", "resume=true")
    assert code == 0, errors
    assert "had 4 epochs and now has 8" in errors
    rate = content(tmp_path / "run")["optimizer_states"][0]["param_groups"][0]["lr"]
    assert rate == pytest.approx(0, abs=1e-12)  # the end of the new plan
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/lr")
    last = float(rows[-1].split(",")[column])
    assert last == pytest.approx(0.01 * (1 + math.cos(math.pi * 7 / 8)) / 2)
    code, errors = script_here("train", *run, "task.max_epochs=8", "resume=true")
    assert (code, errors) == (0, "")  # done before


def test_anything_else_than_more_epochs_is_another_job(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    run = [*COMMON, "method=pointwise", "hydra.run.dir=run"]
    assert script_here("train", *run, "trainer.max_epochs=2")[0] == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    for changes in (
        ["trainer.max_epochs=1"],
        ["trainer.max_epochs=3", "seed=1"],
        ["trainer.max_epochs=3", "method.optimizer.lr=0.5"],
    ):
        code, errors = script_here("train", *run, *changes, "resume=true")
        assert code == 1
        assert "another configuration" in errors
    code, errors = script_here("train", *run, "trainer.max_epochs=3")  # without resume
    assert "already holds a job" in errors
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_sweep_is_prolonged_job_by_job(script_here: ScriptHere, tmp_path: Path) -> None:
    sweep = ["-m", *COMMON, "method=pointwise", "seed=0,1", "hydra.sweep.dir=s"]
    assert script_here("train", *sweep, "trainer.max_epochs=2")[0] == 0
    code, errors = script_here("train", *sweep, "trainer.max_epochs=3", "resume=true")
    assert code == 0, errors
    folders = sorted(path for path in (tmp_path / "s").iterdir() if path.is_dir())
    assert [content(folder)["epoch"] for folder in folders] == [2, 2]


@pytest.mark.parametrize("text", ["", "[]", "trainer: 3", "trainer: {max_epochs: x}", "\x00"])
def test_a_folder_with_an_odd_configuration_is_not_prolonged(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert not is_prolonged(tmp_path, {"trainer": {"max_epochs": 3}})
    assert not is_prolonged(tmp_path / "nowhere", {"trainer": {"max_epochs": 3}})
