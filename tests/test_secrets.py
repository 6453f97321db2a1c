"""Keys in the environment are in no file that a job leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bqnn.secrets import refuse_secrets

ScriptHere = Callable[..., tuple[int, str]]
KEY = "5ec12e7" + 33 * "a"  # as long as those of Weights & Biases
RUN = ["logger=wandb", "trainer=smoke", "task=synthetic", "plots=false", "method.num_samples=2"]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("SOME_VARIABLE", "5ec12e7-of-the-environment")


def files_with(folder: Path, text: str) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if text.encode() in path.read_bytes()]


def test_a_run_and_a_failed_one_leave_no_key_and_no_environment(
    keys: None, script_here: ScriptHere, tmp_path: Path
) -> None:
    code, errors = script_here("train", *RUN, "hydra.run.dir=run")
    assert code == 0, errors
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    code, _ = script_here("train", *RUN, "method.optimizer.lr=1e30", "hydra.run.dir=failed")
    assert code == 1  # not finite: its log has a traceback
    assert "Traceback" in (tmp_path / "failed" / "train.log").read_text()
    assert files_with(tmp_path, "5ec12e7") == []


def test_a_configuration_with_a_key_is_refused(
    keys: None, script_here: ScriptHere, tmp_path: Path
) -> None:
    code, errors = script_here(
        "train", *RUN, "logger.tags=['${oc.env:WANDB_API_KEY}']", "hydra.run.dir=run"
    )
    assert code == 1
    assert "logger.tags holds the environment's WANDB_API_KEY" in errors
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "FAILED"
    assert files_with(tmp_path, "5ec12e7") == []


def test_a_sweep_with_a_key_is_refused_before_anything_is_written(
    keys: None, script_here: ScriptHere, tmp_path: Path
) -> None:
    code, errors = script_here("train", "-m", *RUN, f"logger.entity={KEY}", "seed=0,1")
    assert code == 1
    assert "the command line holds the environment's WANDB_API_KEY" in errors
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_only_what_is_named_like_a_secret_and_long_enough_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHORT_KEY", "data")
    monkeypatch.setenv("BQNN_DATA_DIR", "/a/long/folder")
    monkeypatch.setenv("DB_PASSWORD", "correct horse")
    refuse_secrets({"task": {"root": "data"}, "data_dir": "/a/long/folder", "seed": 0})
    with pytest.raises(ValueError, match=r"task\.roots holds the environment's DB_PASSWORD"):
        refuse_secrets({"task": {"roots": ["/x", "x correct horse y"]}})
