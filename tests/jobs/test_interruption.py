"""A signal ends a Job, even if a library swallows the exception."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from bqnn.jobs.job import Job
from tests.jobs.status_file import status


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    for _ in range(1000):  # it is handled between two instructions
        time.sleep(0.001)


def test_a_signal_ends_a_job_whose_folder_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    codes: list[int] = []
    folder.mkdir()
    with pytest.raises(SystemExit) as stop, Job(folder, "train") as job:
        job.claim()
        job.at_end(codes.append)
        shutil.rmtree(folder)
        try:
            send(signal.SIGTERM)
        except Exception as error:  # as Lightning, Hydra and W&B do around what they call
            pytest.fail(f"the signal became {error!r}")
    assert stop.value.code == 130
    assert job.state == "INTERRUPTED"
    assert codes == [1]
    (line,) = capsys.readouterr().err.splitlines()
    assert "status.json cannot be written" in line


def test_a_signal_that_a_library_swallowed_ends_the_job_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bqnn.jobs.interruption.INSIST_SECONDS", 0.05)
    with pytest.raises(SystemExit) as stop, Job(tmp_path, "train") as job:
        job.claim()
        with contextlib.suppress(BaseException):
            send(signal.SIGTERM)
        for _ in range(10_000):
            time.sleep(0.001)
    assert stop.value.code == 130
    assert status(tmp_path)["state"] == "INTERRUPTED"


@pytest.mark.parametrize("error", [None, RuntimeError("of a library that was interrupted")])
def test_no_next_job_runs_after_a_signal_however_its_job_ended(
    error: Exception | None, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop, Job(tmp_path, "train") as job:
        job.claim()
        with contextlib.suppress(SystemExit):
            send(signal.SIGINT)
        if error is not None:
            raise error
    assert stop.value.code == 130
    assert status(tmp_path)["state"] == ("DONE" if error is None else "INTERRUPTED")


def test_a_second_signal_ends_a_job_at_once(tmp_path: Path) -> None:
    def stubborn() -> None:
        with Job(tmp_path, "train") as job:
            job.at_end(lambda _: time.sleep(60))
            job.claim()  # the first signal may come before this returns
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=stubborn)
    process.start()
    assert process.pid is not None
    while not (tmp_path / "status.json").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    while status(tmp_path)["state"] != "INTERRUPTED":
        time.sleep(0.01)
    time.sleep(0.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 130
    assert status(tmp_path)["state"] == "INTERRUPTED"


def test_signal_handlers_are_left_as_they_were(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Job(tmp_path, "train"):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
