"""A job's folder says what became of it."""

import contextlib
import ctypes
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bqnn.jobs.job import Job, run_parts
from bqnn.jobs.launch import fresh_folder
from bqnn.jobs.status import config_hash, find_run, is_running, read_status
from bqnn.training.process import prepare_torch


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
    assert capsys.readouterr().err.startswith("bqnn train: rate=2: too high")
    assert codes == [1]


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
            monkeypatch.setattr("bqnn.jobs.job.write_json", full)
            if error is not None:
                raise error
        monkeypatch.undo()
        assert job.state == "FAILED"
        assert codes == [1]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert said in lines[0]


class Broken(io.StringIO):
    """A stream whose reader is gone; `seen` is called at every write."""

    def __init__(self, seen: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.seen = seen

    def write(self, text: str, /) -> int:
        self.seen()
        raise BrokenPipeError


@pytest.mark.parametrize("error", [None, ValueError("rate=2"), KeyboardInterrupt()])
def test_status_actions_and_unlocking_come_before_what_is_said(
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


def test_a_log_that_cannot_be_written_is_not_told_at_length(
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
    monkeypatch.setattr("bqnn.jobs.job.INSIST_SECONDS", 0.05)
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


@pytest.mark.parametrize("failure", [OSError("full"), SystemExit(130), KeyboardInterrupt()])
def test_what_is_to_be_done_at_the_end_is_done_after_a_failure_of_it(
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


def test_a_job_is_recognized_by_what_its_results_depend_on() -> None:
    config = {"seed": 0, "resume": False, "logger": {"name": "none"}, "trainer": {"threads": 1}}
    same = {"seed": 0, "data_dir": "x", "logger": {}, "trainer": {"progress_bar": False}}
    assert config_hash(config) == config_hash(same)
    assert config_hash(config) != config_hash({**config, "seed": 1})
    assert "threads" in config["trainer"]


def test_a_job_killed_before_it_was_configured_is_taken_over(tmp_path: Path) -> None:
    Job(tmp_path, "train").claim()
    (tmp_path / ".checkpoint.ckpt.1.part").touch()
    with Job(tmp_path, "train") as job:
        assert job.take({"seed": 0}, resume=True)
        assert not job.is_resumed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "status.json"]
    again = Job(tmp_path, "train")
    assert not again.take({"seed": 0}, resume=True)
    with pytest.raises(FileExistsError, match="another configuration"):
        again.take({"seed": 1}, resume=True)


def test_a_running_job_is_not_resumed(tmp_path: Path) -> None:
    with Job(tmp_path, "train") as job:
        job.take({"seed": 0}, resume=False)
        assert is_running(tmp_path)
        with pytest.raises(BlockingIOError, match="another process"):
            Job(tmp_path, "train").take({"seed": 0}, resume=True)
    assert not is_running(tmp_path)


def test_a_run_that_is_done_is_found_before_newer_ones(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "deep" / name).mkdir(parents=True)
        with Job(tmp_path / "deep" / name, "train") as job:
            job.take({"seed": 0}, resume=False)
            if name != "b":
                raise ValueError("failed")
    key = config_hash({"seed": 0})
    assert find_run(tmp_path, key) == tmp_path / "deep" / "b"
    (tmp_path / "deep" / "b" / "status.json").unlink()
    assert find_run(tmp_path, key) == tmp_path / "deep" / "c"
    assert find_run(tmp_path, config_hash({"seed": 1})) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to be found")
def test_parts_have_folders_whatever_their_tasks_are_called(tmp_path: Path) -> None:
    names = ["é" * 200, "x" * 200, "a/b", "\x1b[2J", ".", "digits"]
    parts: dict[str, Any] = {"checkpoint": "*.ckpt", "method": {"name": "bbb"}}
    ran = []
    with Job(tmp_path, "evaluate") as job:
        job.configure(parts)
        configs = [{**parts, "task": {"name": name}} for name in names]
        run_parts(job, configs, lambda part: ran.append(part.folder.name))
    assert job.state == "DONE"
    assert len(ran) == len(names)
    assert ran[-1] == "5_bbb_digits"
    assert all(name.isascii() and name.isprintable() and len(name) <= 140 for name in ran)


def test_optimizers_do_not_search_for_gpus_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as Lightning sets it
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.ones(2)
    job = Job(tmp_path, "train")
    job.configure({"trainer": {"threads": None, "accelerator": "auto"}})
    assert prepare_torch(job) == "cpu"
    searches: list[str] = []
    monkeypatch.setattr(ctypes.CDLL, "__init__", lambda self, name, *_: searches.append(name))
    optimizer.step()
    assert not searches


ODD = {
    "empty": "",
    "list": "[]",
    "nothing": "{}",
    "number": "5",
    "state": '{"state": 5}',
    "state list": '{"state": ["DONE"]}',
    "word": '{"state": "done"}',
    "cut": '{"state": "DO',
}


@pytest.mark.parametrize("content", [*ODD.values(), None], ids=[*ODD, "folder"])
def test_a_status_that_is_none_is_said_and_stops_no_search(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c/d"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a", "c/d"):
        Job(tmp_path / name, "train").take({"seed": 0}, resume=False)
    for folder in ("b", "c"):  # c holds a job below
        if content is None:
            (tmp_path / folder / "status.json").mkdir()
        else:
            (tmp_path / folder / "status.json").write_text(content)
    (tmp_path / "a" / "status.json").unlink()
    capsys.readouterr()
    assert find_run(tmp_path, config_hash({"seed": 0})) == tmp_path / "c" / "d"
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[0] for line in lines] == [f"{tmp_path / n}:" for n in ("b", "c")]
    assert all("status.json" in line for line in lines)
    with pytest.raises(FileExistsError, match=r"status\.json .*remove its status\.json"):
        Job(tmp_path / "b", "train").take({"seed": 0}, resume=True)
    assert not (tmp_path / "b" / "config.yaml").exists()


def test_a_job_whose_status_is_none_is_recognized_by_its_configuration(tmp_path: Path) -> None:
    config = {"seed": 0, "method": {"optimizer": {"lr": 1e-5}}}
    with Job(tmp_path, "train") as job:
        job.take(config, resume=False)
    (tmp_path / "status.json").write_text("")
    with Job(tmp_path, "train") as again:
        assert again.take(config, resume=True)
        assert again.is_resumed
    assert status(tmp_path)["state"] == "DONE"
    (tmp_path / "status.json").write_text("")
    with pytest.raises(FileExistsError, match="status"):
        Job(tmp_path, "train").take({"seed": 1}, resume=True)


ODD_VALUES: list[object] = [None, 5, "", "../yesterday", [], {"a": 1}]


@pytest.mark.parametrize("odd", ODD_VALUES)
def test_a_status_with_odd_values_is_that_of_its_job(odd: object, tmp_path: Path) -> None:
    with Job(tmp_path, "train") as job:
        job.take({"seed": 0}, resume=False)
    names = ("start", "end", "error", "id", "versions", "git_commit", "host", "parts")
    changed = {**status(tmp_path), **dict.fromkeys(names, odd), "state": "INTERRUPTED"}
    (tmp_path / "status.json").write_text(json.dumps(changed))
    assert find_run(tmp_path, config_hash({"seed": 0})) == tmp_path
    with Job(tmp_path, "train") as again:
        assert again.take({"seed": 0}, resume=True)
    assert again.is_resumed
    assert re.fullmatch("[0-9a-f]{8}", status(tmp_path)["id"])
    assert (read_status(tmp_path) or {})["state"] == "DONE"


def test_the_newest_run_is_found_across_a_change_of_utc_offset(tmp_path: Path) -> None:
    starts = {"older": "2026-10-25T02:30:00+02:00", "newer": "2026-10-25T02:15:00+01:00"}
    for name, start in starts.items():
        (tmp_path / name).mkdir()
        with Job(tmp_path / name, "train") as job:
            job.take({"seed": 0}, resume=False)
        changed = {**status(tmp_path / name), "start": start}
        (tmp_path / name / "status.json").write_text(json.dumps(changed))
    assert find_run(tmp_path, config_hash({"seed": 0})) == tmp_path / "newer"


@pytest.mark.parametrize("group", [None, "method"])
def test_a_job_is_recognized_by_what_its_checkpoint_holds(
    group: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.ckpt"
    path.write_bytes(b"first")
    for where in (path, tmp_path):  # of a run's folder, the checkpoint in it
        start: dict[str, object] = {"checkpoint": str(where)}
        config = start if group is None else {group: {"init_from": str(where)}}
        run = tmp_path / f"run_{where.name}"
        run.mkdir()

        def is_recognized(config: dict = config, run: Path = run) -> bool:
            key = config_hash(config)
            return find_run(run, key) == run

        path.write_bytes(b"first")
        with Job(run, "train") as job:
            job.take(config, resume=False)
        assert is_recognized()
        path.write_bytes(b"other")  # of the same length
        assert not is_recognized()
        with pytest.raises(FileExistsError, match="changed since"):
            Job(run, "train").take(config, resume=True)
        path.unlink()
        assert is_recognized()  # nothing says that it is another one
        os.mkfifo(path)
        assert is_recognized()
        path.unlink()


def test_a_resumed_job_says_which_versions_have_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def resume(**changes: object) -> list[str]:
        (tmp_path / "status.json").write_text(json.dumps({**status(tmp_path), **changes}))
        caplog.clear()
        with Job(tmp_path, "train") as job:
            job.take({"seed": 0}, resume=True)
        return [record.getMessage() for record in caplog.records]

    with Job(tmp_path, "train") as job:
        job.take({"seed": 0}, resume=False)
    versions = status(tmp_path)["versions"]
    assert resume(state="INTERRUPTED") == []
    (line,) = resume(
        state="INTERRUPTED", versions={**versions, "torch": "1.0"}, git_commit="abcdef"
    )
    assert f"torch {versions['torch']} instead of '1.0'" in line
    assert "instead of 'abcdef'" in line
    assert line.isprintable()
    assert resume(state="DONE", git_commit="abcdef") == []  # nothing runs
