"""A Job records its state and does not propagate its failure."""

import logging
from pathlib import Path

import pytest

from bqnn.jobs.job import Job
from tests.jobs.status_file import status


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
    assert capsys.readouterr().err.startswith("bqnn train: rate=2: too high")
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


def test_of_several_processes_the_first_writes_and_the_others_record_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"seed": 0, "trainer": {"devices": 2}}
    for key, value in {"WORLD_SIZE": "2", "MASTER_PORT": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)

    def fail_as_second(message: str) -> None:
        with Job(tmp_path, "train") as second:
            second.take(config, resume=False)
            raise ValueError(message)

    with Job(tmp_path, "train") as first:
        first.claim()
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with Job(tmp_path, "train") as second:
            assert second.take(config, resume=False)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        fail_as_second("no memory left")
        assert status(tmp_path)["error"] == "no memory left"
        raise ValueError("what the first has to say")
    fail_as_second("the connection is closed")
    assert status(tmp_path)["error"] == "what the first has to say"
    assert logging.root.manager.disable == logging.NOTSET
