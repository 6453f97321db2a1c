"""All steps of the end of a Job run, however the Job ends."""

import contextlib
import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bqnn.jobs.job import Job
from tests.jobs.status_file import status


def test_a_status_that_cannot_be_written_fails_the_job_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(f"{path} cannot be written")

    for error, said in ((None, "status.json cannot be written"), (ValueError("rate=2"), "rate=2")):
        codes: list[int] = []
        folder = tmp_path / said[:6]
        folder.mkdir()
        with Job(folder, "train") as job:
            job.claim()
            job.at_end(codes.append)
            monkeypatch.setattr("bqnn.jobs.status.write_json", full)
            if error is not None:
                raise error
        monkeypatch.undo()
        assert job.state == "FAILED"
        assert codes == [1]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert said in lines[0]


class Broken(io.StringIO):
    """A stream without a reader; `seen` is called at every write."""

    def __init__(self, seen: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.seen = seen

    def write(self, text: str, /) -> int:
        self.seen()
        raise BrokenPipeError


@pytest.mark.parametrize("error", [None, ValueError("rate=2"), KeyboardInterrupt()])
def test_status_actions_and_unlocking_precede_messages(
    error: BaseException | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str, list[int], bool]] = []
    codes: list[int] = []

    def look() -> None:
        found.append((status(tmp_path)["state"], [*codes], (tmp_path / ".lock").exists()))

    state, code = ("DONE", 0) if error is None else ("FAILED", 1)
    state = "INTERRUPTED" if isinstance(error, KeyboardInterrupt) else state
    ending = pytest.raises(SystemExit) if state == "INTERRUPTED" else contextlib.nullcontext()
    with ending, Job(tmp_path, "train", resume_command="python train.py") as job:
        job.claim()
        job.at_end(codes.append)
        monkeypatch.setattr(sys, "stderr", Broken(look))
        if error is not None:
            raise error
    assert status(tmp_path)["state"] == state
    assert codes == [code]
    assert not (tmp_path / ".lock").exists()
    assert all(seen == (state, [code], False) for seen in found)
    assert bool(found) == (error is not None)


def test_an_unwritable_log_prints_no_tracebacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, text: str, /) -> int:
            raise OSError(28, "No space left on device")

    handler = logging.StreamHandler(Full())
    log = logging.getLogger("bqnn.test")
    log.addHandler(handler)
    try:
        with Job(tmp_path, "train") as job:
            job.claim()
            log.warning("this takes room")
    finally:
        log.removeHandler(handler)
    assert capsys.readouterr().err == ""
    assert job.state == "DONE"
    assert logging.raiseExceptions


@pytest.mark.parametrize("failure", [OSError("full"), SystemExit(130), KeyboardInterrupt()])
def test_a_failed_action_at_the_end_does_not_stop_the_others(
    failure: BaseException, tmp_path: Path
) -> None:
    codes: list[int] = []

    def fail(code: int) -> None:
        raise failure

    stops = not isinstance(failure, OSError)
    ending = pytest.raises(SystemExit) if stops else contextlib.nullcontext()
    with ending, Job(tmp_path, "train") as job:
        job.claim()
        job.at_end(codes.append)
        job.at_end(fail)
    assert codes == [0]
    assert not (tmp_path / ".lock").exists()
    assert status(tmp_path)["state"] == "DONE"
