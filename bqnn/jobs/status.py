"""status.json: the record of a job, and finding earlier runs by it."""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bqnn.jobs.records import instant, read_record
from bqnn.jobs.terminal import say_once
from bqnn.text import printable, short

# What results do not depend on: runs that differ in nothing else are the same run.
WITHOUT_EFFECT = (
    *("resume", "trust", "logger", "data_dir", "trainer.threads", "trainer.progress_bar"),
)
LENGTH = ("trainer.max_epochs", "task.max_epochs")  # of a training, which can be prolonged
ELSEWHERE = "elsewhere.json"  # in a sweep, in place of a job that an older folder holds

STATES = ("RUNNING", "DONE", "FAILED", "INTERRUPTED")
# What else a status.json holds that is relied on. Anything of another type is taken for missing.
TYPES: dict[str, type] = {
    **dict.fromkeys(("start", "end", "error", "id", "config_hash", "git_commit"), str),
    "versions": dict,
    "parts": list,
}


def config_hash(config: dict[str, Any], without: Iterable[str] = WITHOUT_EFFECT) -> str:
    """Hash a resolved configuration. Equal hashes mean equal results.

    `without` are keys that do not count. Where a job starts from a checkpoint, its SHA-256 follows
    after a dash: one that was trained anew gives other results. `is_same` compares.
    """
    kept = deepcopy(config)
    for key in without:
        node, last = _node(kept, key)
        node.pop(last, None)
    key = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
    digest = input_digest(config)
    return key if digest is None else f"{key}-{digest[:16]}"


def input_digest(config: dict[str, Any]) -> str | None:
    """Return the SHA-256 of the checkpoint that a job starts from.

    None where it starts from none, where it is gone, and for a pattern: each of the files that it
    stands for is the input of a job of its own.
    """
    node, last = _node(config, "checkpoint" if "checkpoint" in config else "method.init_from")
    named = node.get(last)
    if not isinstance(named, str):
        return None
    try:
        path = Path(named)
        path = path / "checkpoint.ckpt" if path.is_dir() else path
        found = path.stat()
        if not path.is_file():  # a FIFO would be waited for
            return None
        return _digest(path.absolute(), found.st_mtime_ns, found.st_size, found.st_ino)
    except (OSError, ValueError):  # what is no path is refused where it is opened
        return None


def is_same(recorded: str | None, config_hash: str) -> bool:
    """Return whether a recorded hash is this one, except for a checkpoint that is gone."""
    return recorded == config_hash or (
        recorded is not None and recorded.partition("-")[0] == config_hash
    )


def is_prolonged(folder: Path, config: dict[str, Any]) -> bool:
    """Return whether a folder holds a shorter training of this configuration."""
    try:
        before = read_record(folder / "config.yaml")
        shorter = before["trainer"]["max_epochs"] < config["trainer"]["max_epochs"]
        keys = (*WITHOUT_EFFECT, *LENGTH)
        return shorter and config_hash(before, keys) == config_hash(config, keys)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # evaluate.py trains nothing; and the file may be anything


def read_status(folder: Path) -> dict[str, Any] | None:
    """Read a job's status.json, or return None if there is no job.

    Its `state` is one of STATES, and what it holds of TYPES has that type. A file that is no
    status reads as that of a job that FAILED, with the reason as its `error`, and the reason is
    said once: one such file must not stop all that look around here. Its job is then recognized
    by config.yaml.
    """
    path = folder / "status.json"
    try:
        status = read_record(path)
        if status.get("state") not in STATES:
            raise ValueError(f"status.json has the state {short(status.get('state'))}")
    except FileNotFoundError:
        return None
    except ValueError as error:
        if not os.path.lexists(path):  # the folder is none
            return None
        tell_unreadable(folder, error)
        return {"state": "FAILED", "error": str(error), "is_unreadable": True} | _recorded(folder)
    for key, kind in TYPES.items():
        if not isinstance(status.get(key), kind):
            status.pop(key, None)
    return status


def tell_unreadable(folder: Path, error: ValueError) -> None:
    """Print once per process that a record cannot be read."""
    say_once(printable(f"{folder}: {error}"))


def is_finished(status: dict[str, Any], config_hash: str) -> bool:
    """Return whether the record is of this job, DONE, and without parts."""
    same = is_same(status.get("config_hash"), config_hash)
    return same and status["state"] == "DONE" and not status.get("parts")


def job_folders(root: Path) -> Iterator[Path]:
    """Return the folders of jobs at and below `root`, sorted, without those inside of others."""
    for folder, below, files in os.walk(root):
        below.sort()
        if {"status.json", ELSEWHERE} & {*files, *below}:
            path = Path(folder)
            yield path
            if not (read_status(path) or {}).get("is_unreadable"):  # or it may be no job's
                below.clear()


def find_run(root: Path, config_hash: str) -> Path | None:
    """Return the newest run of this configuration below `root`; a DONE run wins."""
    found = []
    for folder in job_folders(root):
        status = read_status(folder)
        if status is not None and is_same(status.get("config_hash"), config_hash):
            found.append((status["state"] == "DONE", start_of(status), folder))
    return max(found)[2] if found else None


def start_of(record: dict[str, Any]) -> datetime:
    """Return when a job or a sweep started, or the earliest time if unknown."""
    return instant(record.get("start")) or datetime.min.replace(tzinfo=UTC)


def folder_lock(folder: Path) -> FileLock:
    """Return the lock on a job's folder. It ends with the process that holds it."""
    return FileLock(folder / ".lock")


def is_running(folder: Path) -> bool:
    """Return whether a process runs in this folder, possibly on another machine."""
    if not (folder / ".lock").exists():
        return False
    lock = folder_lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # .lock is no file, or this file system is read-only
        return False
    lock.release()
    return False


def _recorded(folder: Path) -> dict[str, str]:
    try:
        return {"config_hash": config_hash(read_record(folder / "config.yaml"))}
    except (OSError, ValueError, TypeError, RecursionError):  # a date, or thousands of brackets
        return {}


def _node(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The group that holds a dotted key, and the key in it; an empty one where there is none."""
    *groups, last = key.split(".")
    for group in groups:
        found = config.get(group)
        config = found if isinstance(found, dict) else {}
    return config, last


@functools.cache
def _digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
