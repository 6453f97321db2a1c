"""A job's folder says what became of it."""

import json
from pathlib import Path

import pytest

from bqnn.config import fresh_folder
from bqnn.run import Job


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def test_a_job_is_running_then_done(tmp_path: Path) -> None:
    codes: list[int] = []
    with Job(tmp_path, "train") as job:
        job.claim()
        job.at_end(codes.append)
        assert status(tmp_path)["state"] == "RUNNING"
        assert status(tmp_path)["end"] is None
    assert status(tmp_path)["state"] == "DONE"
    assert codes == [0]


def test_a_failure_is_recorded_said_and_kept_inside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    with Job(tmp_path, "train") as job:
        job.claim()
        job.at_end(codes.append)
        raise ValueError("rate=2: too high")
    assert status(tmp_path)["state"] == "FAILED"
    assert status(tmp_path)["error"] == "rate=2: too high"
    assert capsys.readouterr().err.startswith("train.py: rate=2: too high")
    assert codes == [1]


def test_an_unexpected_error_is_named_by_its_kind(tmp_path: Path) -> None:
    with Job(tmp_path, "train") as job:
        job.claim()
        raise KeyError("missing")
    assert status(tmp_path)["error"] == "KeyError: 'missing'"


def test_an_interruption_is_recorded_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop, Job(tmp_path, "train") as job:
        job.claim()
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert status(tmp_path)["state"] == "INTERRUPTED"


def test_a_folder_belongs_to_one_job(tmp_path: Path) -> None:
    with Job(tmp_path, "train") as job:
        job.claim()
    before = (tmp_path / "status.json").read_text()
    with Job(tmp_path, "train") as second:
        second.claim()
    assert second.state == "FAILED"
    assert "holds a job already" in (second.error or "")
    assert (tmp_path / "status.json").read_text() == before


def test_fresh_folders_are_never_shared(tmp_path: Path) -> None:
    name = str(tmp_path / "runs" / "a")
    assert [fresh_folder(name) for _ in range(3)] == [name, f"{name}_2", f"{name}_3"]
    assert all(path.is_dir() for path in (tmp_path / "runs").iterdir())
