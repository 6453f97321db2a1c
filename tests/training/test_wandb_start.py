"""Runs of W&B start online or offline with any network, key and home folder."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bqnn.training import wandb_start as tracking

KEY = "a" * 40
START = """
import json, sys
from pathlib import Path
from bqnn.training.wandb_start import start_run
modes = []
for number in range(2):
    folder = Path(sys.argv[1]) / str(number)
    folder.mkdir()
    run = start_run(folder, False, id=f"run{number}", project="bqnn")
    modes.append(run.offline)
    run.log({"a": 1})
    run.finish()
print(json.dumps(modes))
"""


@pytest.fixture
def server() -> Iterator[Callable[[int], tuple[str, list[str]]]]:
    """Start a server that answers with this code; return its address and its requests."""
    servers = []

    def start(code: int) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(f"{self.command} {self.path}")
                self.send_response(code)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                """Do nothing."""

        made = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        servers.append(made)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{made.server_port}", asked

    yield start
    for made in servers:
        made.shutdown()
        made.server_close()


@pytest.fixture
def closed() -> str:
    """Return an address without a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def start_twice(folder: Path, **environment: str) -> tuple[list[bool], str]:
    """Start two runs in one process; return whether each is offline, and stderr."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-c", START, str(folder)]
    result = subprocess.run(
        command, env=kept | environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_servers_that_answer_are_recognized(
    server: Callable[[int], tuple[str, list[str]]], closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 0.5)
    for code in (200, 401, 404):
        assert tracking._why_silent(server(code)[0]) is None
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 30)  # so that the answer counts
    assert tracking._why_silent(server(503)[0]) == "it answers 503"
    assert "no connection" in str(tracking._why_silent(closed))
    assert "no connection" in str(tracking._why_silent("no address"))


def test_a_silent_server_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 0.2)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert "no" in str(tracking._why_silent(address))


def test_without_network_runs_are_offline_and_the_server_is_asked_once(
    tmp_path: Path, closed: str
) -> None:
    offline, errors = start_twice(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=closed)
    assert offline == [True, True]
    (line,) = errors.strip().splitlines()
    assert closed in line
    assert "stored offline" in line


@pytest.mark.parametrize("key", [KEY, "short"])
def test_a_key_that_is_refused_leaves_runs_offline(
    key: str, tmp_path: Path, server: Callable[[int], tuple[str, list[str]]]
) -> None:
    address, asked = server(401)
    offline, errors = start_twice(tmp_path, WANDB_API_KEY=key, WANDB_BASE_URL=address)
    assert offline == [True, True]
    said = [line for line in errors.splitlines() if not line.startswith("Failed to export")]
    assert len(said) == 1  # scripts silence the other loggers
    assert "stored offline" in said[0]
    assert asked.count("GET /") == 1
    for number in range(2):
        assert list((tmp_path / str(number)).glob("wandb/offline-run-*/run-*.wandb"))


def test_without_a_home_and_a_key_nothing_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    assert start_twice(tmp_path) == ([True, True], "")


def test_a_sweep_without_network_and_home_is_trained(
    script: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    closed: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", os.devnull + "/home")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", closed)
    arguments = ["trainer=smoke", "task=synthetic", "method=pointwise", "logger=wandb"]
    result = script("train", "-m", *arguments, "seed=0,1", "hydra.sweep.dir=sweep")
    assert result.returncode == 0, result.stderr
    foreign = [
        line
        for line in result.stderr.splitlines()
        if not line.startswith(("CPU threads", "epoch ", "evaluating "))
    ]
    assert len(foreign) == 1, result.stderr
    assert "stored offline" in foreign[0]
    for number in (0, 1):
        job = tmp_path / "sweep" / f"{number}_pointwise_synthetic_s{number}"
        assert json.loads((job / "status.json").read_text())["state"] == "DONE"
        assert list(job.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("home", [None, "/dev/null/home", "relative", "."])
def test_caches_move_if_home_is_read_only(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR")
    for name in (*names, "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    kept = {} if home is None else {"HOME": home}
    tracking._find_folders(tmp_path, kept)
    for name in names:
        assert Path(os.environ[name]).parent == tmp_path


def test_a_user_without_a_home_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"WANDB_{kind}_DIR" for kind in ("CACHE", "DATA", "CONFIG")]
    names += [f"XDG_{kind}_HOME" for kind in ("CACHE", "DATA", "CONFIG")]
    for name in names:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where no user is known
    tracking._find_folders(tmp_path, {})
    assert {Path(os.environ[name]).parent for name in names} == {tmp_path}


def test_a_home_that_takes_files_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR")
    for name in names:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    home = "HOME" if os.name == "posix" else "USERPROFILE"
    tracking._find_folders(tmp_path / "job", {home: str(tmp_path / "new")})
    assert not any(name in os.environ for name in names)
