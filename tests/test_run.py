"""A job's folder says what became of it."""

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bqnn.config import fresh_folder
from bqnn.run import Job, run_parts
from bqnn.status import config_hash, find_run, is_running
from bqnn.trainer import prepare_torch


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
            monkeypatch.setattr("bqnn.run.write_json", full)
            if error is not None:
                raise error
        monkeypatch.undo()
        assert job.state == "FAILED"
        assert codes == [1]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert said in lines[0]


def test_of_several_processes_the_first_writes_and_the_others_record_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        with Job(tmp_path, "train") as first:
            first.claim()
            monkeypatch.setenv("LOCAL_RANK", "1")
            before = {path: path.read_bytes() for path in tmp_path.iterdir()}
            with Job(tmp_path, "train") as second:
                assert second.take({"seed": 0}, resume=False)
            assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
            with Job(tmp_path, "train"):
                raise ValueError("no memory left")
            assert status(tmp_path)["error"] == "no memory left"
            monkeypatch.delenv("LOCAL_RANK")
            raise ValueError("what the first has to say")
        monkeypatch.setenv("LOCAL_RANK", "1")
        with Job(tmp_path, "train"):
            raise ValueError("the connection is closed")
        assert status(tmp_path)["error"] == "what the first has to say"
    finally:
        logging.disable(logging.NOTSET)


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
