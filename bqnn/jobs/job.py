"""Run a Job in its folder, record its status, and handle its end."""

import _thread
import contextlib
import ctypes
import functools
import itertools
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from filelock import Timeout

from bqnn.files import write_json, write_text
from bqnn.jobs.ranks import ALONE, find_place, hide_launcher
from bqnn.jobs.secrets import mask, refuse_secrets
from bqnn.jobs.status import (
    config_hash,
    folder_lock,
    input_digest,
    is_finished,
    is_prolonged,
    is_same,
    read_status,
)
from bqnn.jobs.terminal import say
from bqnn.jobs.typed import program
from bqnn.text import one_line, short, valid_name

log = logging.getLogger(__name__)
traceback_log = logging.getLogger("bqnn.traceback")  # conf/hydra sends it to the log file only

# The files that Jobs write. A Job refuses a folder that holds one of another owner.
WRITTEN = (
    *("config.yaml", "checkpoint.ckpt", "best.ckpt", "predictions.npz", "uncertainty.npz"),
    *("metrics.csv", "metrics.json", "size.json", "quantization.csv", "risk_coverage.csv"),
    *("curves.png", "reliability.png", "confidence.png", "fit.png", "interval_calibration.png"),
    *("weights.png", "risk_coverage.png", "shift.png", "ood.png", "convergence.png"),
)
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "hydra-core")
PROCESS_STARTED = time.perf_counter()
INSIST_SECONDS = 10.0  # until a swallowed interruption is repeated


class Job:
    """A context manager that runs one Job in its own folder.

    The Job writes config.yaml and status.json. The state in status.json is RUNNING, then DONE,
    FAILED or INTERRUPTED. The folder is locked while the Job runs; the lock ends with its process.

    The context does not propagate exceptions. It writes the traceback to the log, and one line to
    the terminal and to status.json. Only an interruption propagates, as SystemExit(130).

    At the end, the Job writes its status, runs the actions of `at_end`, unlocks the folder and
    prints its messages, in this order. A failure of one step does not prevent the next.

    If several processes train one model, the first process writes. The others record only a
    failure, because Lightning kills the first process when another one fails.

    Args:
        folder: The folder of the Job.
        verb: The name of the program, such as "train".
        sweep: The name of the multirun that the Job is part of, or None.
        resume_command: The command that an interrupted Job prints for the user, or None.
    """

    def __init__(
        self, folder: Path, verb: str, sweep: str | None = None, resume_command: str | None = None
    ) -> None:
        self.config: dict[str, Any] = {}
        self.folder = folder
        self.verb = verb
        self.rank, self.launcher = ALONE
        self.sweep = sweep
        self.resume_command = resume_command
        self.id = uuid.uuid4().hex[:8]  # unchanged when the Job is resumed
        self.state = "RUNNING"
        self.error: str | None = None
        self.started = datetime.now().astimezone()
        self.parts: list[str] = []
        self.is_resumed = False
        self.is_prolonged = False  # a training resumed with more epochs
        self._hash: str | None = None
        self._input_digest: str | None = None
        self._resumed_from_epoch: int | None = None
        self._claimed = False
        self._is_interrupted = False
        self._insists = False
        self._ended = threading.Event()
        self._at_end: list[Callable[[int], None]] = []
        self._handlers: dict[int, Any] = {}
        global _num_jobs
        self._clock = time.perf_counter() if _num_jobs else PROCESS_STARTED
        _num_jobs += 1

    def claim(self) -> None:
        """Lock the folder and write the first status.

        Raises:
            FileExistsError: The folder holds an earlier Job, or a file that the Job would
                overwrite. The folder is unchanged.
            BlockingIOError: Another process runs in the folder.
        """
        self._lock()
        if (self.folder / "status.json").exists():
            self._unlock()
            raise FileExistsError(
                f"{self.folder} holds a job already (status.json is there); give another "
                "hydra.run.dir, or none to get a new folder, or go on with it (resume=true)"
            )
        if foreign := next((name for name in WRITTEN if (self.folder / name).exists()), None):
            self._unlock()
            raise FileExistsError(
                f"{self.folder} holds {foreign}, which the job would overwrite; move it away, or "
                "give another hydra.run.dir, or none to get a new folder"
            )
        self._claimed = True
        self._write_status()

    def configure(self, config: dict[str, Any]) -> None:
        """Set the configuration and write it to config.yaml.

        Args:
            config: The resolved configuration.

        Raises:
            ValueError: The configuration holds a secret of the environment.
        """
        refuse_secrets(config)
        self.config = config
        if self._hash is None:  # the first configuration identifies the Run
            self._hash, self._input_digest = config_hash(config), input_digest(config)
        if self.rank > 0:
            return
        write_text(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        if self._claimed:
            self._write_status()

    def take(self, config: dict[str, Any], resume: bool) -> bool:
        """Claim the folder and set the configuration, or resume an earlier process.

        Args:
            config: The resolved configuration.
            resume: Whether to continue the Job in the folder, if there is one.

        Returns:
            Whether there is work to do: False if the Job is DONE.

        Raises:
            FileExistsError: The folder holds another Job, or one with an unreadable status.
            BlockingIOError: Another process runs in the folder.
            ValueError: The configuration holds a secret of the environment, or the number of
                processes differs from the number of devices.
        """
        self._find_place(config)
        if self.rank > 0:  # the first process has claimed the folder
            self.is_resumed = resume
            self._take_id(read_status(self.folder) or {})
            self.configure(config)
            return True
        if not resume:
            self.claim()
            self.configure(config)
            return True
        key = config_hash(config)
        before = read_status(self.folder)
        if before is not None and is_finished(before, key):
            return False
        self._lock()
        before = read_status(self.folder) or {}
        if is_finished(before, key):  # it ended before this process got the lock
            self._unlock()
            return False
        self.is_prolonged = self.verb == "train" and is_prolonged(self.folder, config)
        if not self.is_prolonged and (reason := _other_job(before, key)):
            self._unlock()
            raise FileExistsError(f"{self.folder} {reason}")
        self._claimed = True
        self.is_resumed = self.is_prolonged or is_same(before.get("config_hash"), key)
        self._take_id(before)
        for part in self.folder.glob(".*.part"):  # left behind by a killed process
            part.unlink()
        self.configure(config)
        if self.is_resumed and (changes := _changes_since(before)):
            log.warning(
                "resumed with %s: the results may differ in their last bits from those of a run "
                "that was never interrupted",
                changes,
            )
        return True

    def record_epoch(self, epoch: int) -> None:
        """Record where a resumed training continues.

        Args:
            epoch: The first epoch to train, from 0.
        """
        self._resumed_from_epoch = epoch
        if self.rank == 0:
            self._write_status()

    def at_end(self, action: Callable[[int], None]) -> None:
        """Register an action for the end of the Job. Actions run in reverse order.

        Args:
            action: Called with the exit code, 0 if the Job is DONE and 1 otherwise.
        """
        self._at_end.insert(0, action)

    def seconds(self) -> float:
        """Return the seconds since the Job started; for the first Job, since the process did."""
        return time.perf_counter() - self._clock

    def __enter__(self) -> "Job":
        # Treat SIGTERM like Ctrl-C. Only the main thread can set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._interrupt)
        # With a full disk, logging would print fifty lines per record.
        self._raises_in_logs, logging.raiseExceptions = logging.raiseExceptions, False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._ended.set()
        # Lightning may have installed other handlers.
        for number in self._handlers:
            signal.signal(number, self._interrupt)
        lines = self._conclude(error)
        if error is not None and self.state == "FAILED" and self._claimed:
            _log_traceback(f"{self.verb} failed", error)
        for action in self._at_end:
            try:
                action(0 if self.state == "DONE" else 1)
            except (Exception, KeyboardInterrupt, SystemExit) as failure:
                # The status is already written. Run the remaining actions.
                self._is_interrupted |= _is_interruption(failure)
                _log_traceback("after the end of the job", failure)
                lines.append(f"{program(self.verb)}: after the end of the job: {describe(failure)}")
        if self._claimed and self.rank == 0:
            self._unlock()
        elif self.rank > 0:
            with contextlib.suppress(OSError):  # not empty, or the folder of the first process
                self.folder.rmdir()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        logging.raiseExceptions = self._raises_in_logs
        for line in lines:
            say(line, error=True)
        if self.state == "INTERRUPTED" or self._is_interrupted:
            raise SystemExit(130) from error
        return isinstance(error, Exception)

    def _conclude(self, error: BaseException | None) -> list[str]:
        """Set the final state, write the status, and return the lines to print."""
        lines = []
        if error is None:
            self.state, self.error = "DONE", None
        elif self._is_interrupted or _is_interruption(error):
            self.state, self.error = "INTERRUPTED", "interrupted"
            if self.resume_command is not None and self.rank == 0:
                lines = [
                    f"{program(self.verb)}: interrupted; go on with",
                    f"  {self.resume_command}",
                ]
        else:
            self.state, self.error = "FAILED", describe(error)
            if self.rank > 0:
                first = read_status(self.folder) or {}
                self._claimed = first.get("state") == "RUNNING"
            who = f" (process {self.rank})" if self.rank > 0 else ""
            lines = [f"{program(self.verb)}{who}: {self.error} [{one_line(str(self.folder))}]"]
        try:
            if self._claimed:
                self._write_status()
        except Exception as unwritable:  # status.json is unchanged; report the first failure
            if self.state != "FAILED":
                lines.append(f"{program(self.verb)}: {describe(unwritable)}")
            if self.state == "DONE":
                self.state = "FAILED"
        return lines

    def _interrupt(self, number: int, frame: Any) -> None:
        """Raise SystemExit at the first signal, and end the process at the second."""
        if self._insists:
            self._insists = False
        elif self._is_interrupted:
            os._exit(130)
        else:
            self._is_interrupted = True
            if self._claimed and self.state == "RUNNING":  # the process may be killed soon
                self.state, self.error = "INTERRUPTED", "interrupted"
                # An exception here would look like a failure of the interrupted code.
                with contextlib.suppress(Exception):
                    self._write_status()
            threading.Thread(target=self._insist, daemon=True).start()
        # Do not raise KeyboardInterrupt: Lightning would then ignore a second Ctrl-C.
        if not self._ended.is_set():
            raise SystemExit(130)

    def _insist(self) -> None:
        """Repeat the interruption until the Job ends, as libraries can swallow exceptions."""
        while not self._ended.wait(INSIST_SECONDS):
            self._insists = True
            _thread.interrupt_main(signal.SIGTERM)

    def _find_place(self, config: dict[str, Any]) -> None:
        """Find the rank; hide the variables of ranks if this process is not one of several."""
        if self.verb == "train" and self.sweep is None:
            self.rank, self.launcher = find_place(config.get("trainer", {}))
        if self.launcher is None:
            hidden = hide_launcher()
            self.at_end(lambda _: os.environ.update(hidden))
        if self.rank > 0:
            logging.disable(logging.WARNING)  # the first process logs the same
            self.at_end(lambda _: logging.disable(logging.NOTSET))

    def _take_id(self, status: dict[str, Any]) -> None:
        """Keep the recorded id, which names the Run in Weights & Biases, if it is valid."""
        name = status.get("id", "")
        if name == valid_name(name):
            self.id = name

    def _lock(self) -> None:
        self._folder_lock = folder_lock(self.folder)
        try:
            self._folder_lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(f"{self.folder} is being run by another process") from None

    def _unlock(self) -> None:
        # Remove the file before releasing the lock, so that a waiting process sees it is gone.
        with contextlib.suppress(OSError):  # the folder may have been removed
            (self.folder / ".lock").unlink(missing_ok=True)
        self._folder_lock.release()

    def _write_status(self) -> None:
        ended = None if self.state == "RUNNING" else datetime.now().astimezone().isoformat()
        status: dict[str, Any] = {
            "state": self.state,
            "start": self.started.isoformat(),
            "end": ended,
            "error": self.error,
            "resumed_from_epoch": self._resumed_from_epoch,
            "id": self.id,
            "config_hash": self._hash,
            "input_sha256": self._input_digest,
            "host": socket.gethostname(),
            "versions": versions(),
            **_hardware(),
            "git_commit": _git_commit(),
        }
        if self.parts:
            status["parts"] = self.parts
        write_json(self.folder / "status.json", status)


def run_parts(job: Job, configs: Sequence[dict[str, Any]], task: Callable[[Job], None]) -> None:
    """Run a task for one checkpoint, or for each match of a pattern.

    A single checkpoint runs as the Job itself. Each match of a pattern runs as a part, in a
    numbered and named folder below the folder of the Job. A resumed Job skips parts that are DONE.

    Args:
        job: The Job, whose configuration has the path or the pattern as `checkpoint`.
        configs: One resolved configuration per checkpoint.
        task: Called with the Job, or with the Job of each part.

    Raises:
        RuntimeError: Some parts failed. All parts run first.
    """
    if Path(job.config["checkpoint"]).exists():
        job.configure(configs[0])
        task(job)
        return
    resume = bool(job.config.get("resume"))
    failed = []
    for config in configs:
        part = Job(_part_folder(job, config), job.verb, job.sweep or job.folder.name)
        part.folder.mkdir(exist_ok=True)
        job.parts.append(part.folder.name)
        with part:
            if part.take(config, resume):
                task(part)
        if part.state != "DONE":
            failed.append(part.folder.name)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(job.parts)} failed: {', '.join(failed)}")


def end_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies. Other systems ignore the call.

    Args:
        parent: The process ID of the parent.

    Raises:
        SystemExit: The parent has already died (code 130).
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    if prctl is not None:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl.h
        prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # the parent has already died
            raise SystemExit(130)


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of bqnn, Python and the packages that affect results, by name."""
    return {
        "bqnn": version("bqnn"),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def describe(error: BaseException) -> str:
    """Describe an exception in one line, without secrets.

    Args:
        error: The exception.

    Returns:
        Its message. The name of its type comes first if the type is unexpected or the message is
        empty.
    """
    text = one_line(mask(str(error)))
    expected = (ValueError, TypeError, FloatingPointError, OSError)
    return text if text and isinstance(error, expected) else f"{type(error).__name__}: {text}"


def _log_traceback(message: str, error: BaseException) -> None:
    """Write the traceback to the log file; the terminal gets one line elsewhere."""
    with contextlib.suppress(OSError):  # the folder was removed
        traceback_log.error(message, exc_info=error)


def _other_job(status: dict[str, Any], key: str) -> str | None:
    """Return why a Job cannot resume in a folder with this status, or None if it can."""
    if is_same(status.get("config_hash"), key):
        return None
    if status.get("is_unreadable"):
        return (
            f"holds a job that cannot be told ({status['error']}); remove its status.json to start "
            "anew there, or give another hydra.run.dir, or none"
        )
    if status.get("config_hash") is None:  # killed before its configuration was set
        return None
    return (
        "holds a job with another configuration, or of a checkpoint that has changed since, which "
        "resume=true does not go on with; give another hydra.run.dir, or none"
    )


def _changes_since(status: dict[str, Any]) -> str:
    """Describe the versions that differ from those of the earlier process of the Run."""
    before = {**status.get("versions", {}), "commit": status.get("git_commit")}
    now = {**versions(), "commit": _git_commit()}
    return ", ".join(
        f"{name} {now[name] or 'unknown'} instead of {short(before[name])}"
        for name in now
        if before.get(name) not in (None, now[name])
    )


def _part_folder(job: Job, config: dict[str, Any]) -> Path:
    """Return the folder of an earlier part with this configuration, or a new folder."""
    key = config_hash(config)
    taken = [path for path in job.folder.iterdir() if (path / "status.json").exists()]
    for path in taken:
        if is_same((read_status(path) or {}).get("config_hash"), key):
            return path
    is_known = "method" in config  # unknown if the checkpoint is unreadable
    name = f"{config['method']['name']}_{config['task']['name']}" if is_known else "unreadable"
    name = valid_name(name)  # an untrusted name; 200 letters can take 800 bytes
    numbers = itertools.count(len(taken))
    folders = (job.folder / f"{number}_{name}" for number in numbers)
    return next(folder for folder in folders if not folder.exists())


def _is_interruption(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and error.code == 130
    )


def _hardware() -> dict[str, str | bool | None]:
    """Return the GPU, if one is used, and the CPU features that torch detects.

    A CPU with VNNI multiplies 8-bit integers without saturation.
    """
    # Query torch only if it is imported already: the import takes seconds.
    torch = sys.modules.get("torch")
    if torch is None:
        return {"cpu_capability": None, "cpu_vnni": None, "gpu": None}
    is_used = torch.cuda.is_initialized()
    return {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_vnni": torch.cpu._is_vnni_supported(),
        "gpu": torch.cuda.get_device_name() if is_used else None,
    }


@functools.cache
def _git_commit() -> str | None:
    """Return the commit of the code, or None without a checkout or git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # a wheel, maybe inside of another repository
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


_num_jobs = 0
