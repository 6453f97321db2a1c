"""One job's life: its folder, its status.json, how it ended."""

import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from bqnn.files import write_json, write_text

log = logging.getLogger(__name__)
traceback_log = logging.getLogger("bqnn.traceback")  # conf/hydra sends it to the log file alone

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "hydra-core")
PROCESS_STARTED = time.perf_counter()


class Job:
    """A context in which one job runs, in a folder of its own.

    The folder gets config.yaml and status.json, whose state is RUNNING, then DONE, FAILED or
    INTERRUPTED. An exception ends here: its traceback goes to the log, one line of it to the
    terminal and to status.json; only an interruption goes on, as SystemExit(130). `sweep` names
    the multirun that the job is part of.

    Where several processes train one model, the first writes. Of the others only a failure is
    recorded, because Lightning kills the first process when another one fails.
    """

    def __init__(self, folder: Path, verb: str, sweep: str | None = None) -> None:
        self.config: dict[str, Any] = {}
        self.folder = folder
        self.verb = verb
        self.rank = process_rank()
        self.sweep = sweep
        self.state = "RUNNING"
        self.error: str | None = None
        self.started = datetime.now().astimezone()
        self._claimed = False
        self._at_end: list[Callable[[int], None]] = []
        global _num_jobs
        self._clock = time.perf_counter() if _num_jobs else PROCESS_STARTED
        _num_jobs += 1

    def claim(self) -> None:
        """Take the folder; FileExistsError, and nothing is touched, where a job has it already."""
        if self.rank > 0:  # the first process has taken it
            return
        status = self.folder / "status.json"
        try:
            status.touch(exist_ok=False)
        except FileExistsError:
            raise FileExistsError(
                f"{self.folder} holds a job already (status.json is there); give another "
                "hydra.run.dir, or none to get a new folder"
            ) from None
        self._claimed = True
        self._write_status()

    def configure(self, config: dict[str, Any]) -> None:
        """Give the job its resolved configuration, and record it in config.yaml."""
        self.config = config
        if self.rank > 0:
            return
        write_text(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def at_end(self, action: Callable[[int], None]) -> None:
        """Have `action(exit_code)` called when the job ends, however it ends."""
        self._at_end.append(action)

    def seconds(self) -> float:
        """Seconds since the job started; for the first job since the process did."""
        return time.perf_counter() - self._clock

    def __enter__(self) -> "Job":
        self._set_signals(signal.default_int_handler)
        if self.rank > 0:
            logging.disable(logging.WARNING)  # the first process says it, too
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._set_signals(signal.SIG_IGN)  # a second signal must not leave RUNNING behind
        if error is None:
            self.state = "DONE"
        elif _is_interruption(error):
            self.state, self.error = "INTERRUPTED", "interrupted"
        else:
            self.state, self.error = "FAILED", one_line(error)
            if self.rank > 0:
                self._claimed = self._first_is_running()
            # The log file has the traceback; the terminal is told in one line.
            if self._claimed:
                logging.raiseExceptions = False  # of a log on a full disk, in twenty lines
                traceback_log.error("%s failed", self.verb, exc_info=(type(error), error, trace))
            who = f" (process {self.rank})" if self.rank > 0 else ""
            print(f"{self.verb}.py{who}: {self.error} [{self.folder}]", file=sys.stderr)
        try:
            if self._claimed:
                self._write_status()
        except OSError as unwritable:  # status.json stays at RUNNING; what failed first was said
            if error is None:
                self.state = "FAILED"
                print(f"{self.verb}.py: {unwritable}", file=sys.stderr)
        self._set_signals(signal.default_int_handler)
        for action in self._at_end:
            try:
                action(0 if self.state == "DONE" else 1)
            except Exception:  # the job has ended as its status says; the rest must still be done
                log.warning("after the end of the job", exc_info=True)
        if self.state == "INTERRUPTED":
            raise SystemExit(130) from error
        return isinstance(error, Exception)

    def _first_is_running(self) -> bool:
        try:
            return json.loads((self.folder / "status.json").read_text())["state"] == "RUNNING"
        except (OSError, ValueError):
            return False

    def _set_signals(self, handler: Any) -> None:
        """Treat SIGTERM like Ctrl-C; Lightning may have left other handlers behind."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
            signal.signal(signal.SIGTERM, handler)

    def _write_status(self) -> None:
        ended = None if self.state == "RUNNING" else datetime.now().astimezone().isoformat()
        status = {
            "state": self.state,
            "start": self.started.isoformat(),
            "end": ended,
            "error": self.error,
            "versions": versions(),
            **_cpu(),
            "git_commit": _git_commit(),
        }
        write_json(self.folder / "status.json", status)


def run_parts(job: Job, configs: dict[str, dict[str, Any]], task: Callable[[Job], None]) -> None:
    """Run `task` for each configuration, in a folder of that name below the job's.

    A single one runs as the job itself. RuntimeError, once all have run: some failed.
    """
    if len(configs) == 1:
        job.configure(*configs.values())
        task(job)
        return
    failed = []
    for name, config in configs.items():
        part = Job(job.folder / name, job.verb, job.sweep or job.folder.name)
        part.folder.mkdir()
        with part:
            part.claim()
            part.configure(config)
            task(part)
        if part.state != "DONE":
            failed.append(name)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(configs)} failed: {', '.join(failed)}")


def process_rank() -> int:
    """Which of the processes that train one model this is, as Lightning tells them; 0 is first."""
    ranks = (os.environ.get(key) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((int(rank) for rank in ranks if rank is not None), 0)


def record_refusal(folder: Path, error: str) -> None:
    """Leave a status.json about a command line that could not become a job."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "status.json").exists():
        now = datetime.now().astimezone().isoformat()
        write_json(
            folder / "status.json",
            {"state": "FAILED", "start": now, "end": now, "error": error, "versions": versions()},
        )


def versions() -> dict[str, str]:
    """The versions of this package, Python and what results depend on."""
    return {
        "bqnn": version("bqnn"),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def one_line(error: BaseException) -> str:
    """What an exception says, in one line, after its kind where that is a surprise."""
    text = " ".join(str(error).split())
    expected = (ValueError, TypeError, FloatingPointError, OSError)
    return text if text and isinstance(error, expected) else f"{type(error).__name__}: {text}"


def _is_interruption(error: BaseException) -> bool:
    # Lightning turns Ctrl-C in the middle of a fit into SystemExit.
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )


def _cpu() -> dict[str, str | bool | None]:
    """What torch finds in the CPU. VNNI: it multiplies 8-bit integers without saturating."""
    # Asked only where torch is there already: importing it takes seconds.
    torch = sys.modules.get("torch")
    if torch is None:
        return {"cpu_capability": None, "cpu_vnni": None}
    return {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_vnni": torch.cpu._is_vnni_supported(),
    }


def _git_commit() -> str | None:
    """The commit of the code, where it runs from a checkout and git is installed."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


_num_jobs = 0
