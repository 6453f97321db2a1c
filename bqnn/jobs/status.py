"""Read status.json, the record of a Run, and find earlier Runs."""

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

# Keys that do not affect results: Runs that differ only in these keys are the same Run.
WITHOUT_EFFECT = (
    *("resume", "trust", "logger", "data_dir", "trainer.threads", "trainer.progress_bar"),
)
LENGTH = ("trainer.max_epochs", "task.max_epochs")  # a training can be resumed with more epochs
ELSEWHERE = "elsewhere.json"  # in a sweep, links to the older folder that holds the Job

STATES = ("RUNNING", "DONE", "FAILED", "INTERRUPTED")
# The types of the other entries that are used. An entry of another type counts as missing.
TYPES: dict[str, type] = {
    **dict.fromkeys(("start", "end", "error", "id", "config_hash", "git_commit"), str),
    "versions": dict,
    "parts": list,
}


def config_hash(config: dict[str, Any], without: Iterable[str] = WITHOUT_EFFECT) -> str:
    """Hash a resolved configuration. Equal hashes mean equal results.

    If the Job starts from a checkpoint, the hash includes the SHA-256 of the checkpoint, since a
    retrained checkpoint gives other results. Compare hashes with `is_same`.

    Args:
        config: The resolved configuration.
        without: Dotted keys to ignore.

    Returns:
        16 hexadecimal digits; with a checkpoint, a dash and the first 16 digits of its SHA-256
        follow.
    """
    kept = deepcopy(config)
    for key in without:
        node, last = _node(kept, key)
        node.pop(last, None)
    key = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
    digest = input_digest(config)
    return key if digest is None else f"{key}-{digest[:16]}"


def input_digest(config: dict[str, Any]) -> str | None:
    """Return the SHA-256 of the checkpoint that a Job starts from.

    Args:
        config: The resolved configuration.

    Returns:
        The hexadecimal digest. None if the Job starts from no checkpoint, if the checkpoint no
        longer exists, or for a pattern, since each of its matches is the input of its own Job.
    """
    node, last = _node(config, "checkpoint" if "checkpoint" in config else "method.init_from")
    named = node.get(last)
    if not isinstance(named, str):
        return None
    try:
        path = Path(named)
        path = path / "checkpoint.ckpt" if path.is_dir() else path
        found = path.stat()
        if not path.is_file():  # opening a FIFO would block
            return None
        return _digest(path.absolute(), found.st_mtime_ns, found.st_size, found.st_ino)
    except (OSError, ValueError):  # an invalid path is refused when it is opened
        return None


def is_same(recorded: str | None, config_hash: str) -> bool:
    """Return whether two hashes of `config_hash` describe the same Run.

    Args:
        recorded: The recorded hash, or None if there is none.
        config_hash: The current hash. If it lacks the part of the checkpoint, because the
            checkpoint no longer exists, that part of `recorded` is ignored.
    """
    return recorded == config_hash or (
        recorded is not None and recorded.partition("-")[0] == config_hash
    )


def is_prolonged(folder: Path, config: dict[str, Any]) -> bool:
    """Return whether a folder holds a Run of this configuration with fewer epochs.

    Args:
        folder: The folder of the Run.
        config: The resolved configuration of the training.
    """
    try:
        before = read_record(folder / "config.yaml")
        shorter = before["trainer"]["max_epochs"] < config["trainer"]["max_epochs"]
        keys = (*WITHOUT_EFFECT, *LENGTH)
        return shorter and config_hash(before, keys) == config_hash(config, keys)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # not a training, or a file with other content


def read_status(folder: Path) -> dict[str, Any] | None:
    """Read the status.json of a Run.

    An unreadable file must not stop a search through many folders. It reads as a Run that FAILED,
    with the reason as its `error` and the hash of its config.yaml; the reason is printed once.

    Args:
        folder: The folder of the Run.

    Returns:
        The status, or None if there is no Run. Its `state` is one of `STATES`, and its entries
        have the types in `TYPES`.
    """
    path = folder / "status.json"
    try:
        status = read_record(path)
        if status.get("state") not in STATES:
            raise ValueError(f"status.json has the state {short(status.get('state'))}")
    except FileNotFoundError:
        return None
    except ValueError as error:
        if not os.path.lexists(path):  # the path is not a folder
            return None
        tell_unreadable(folder, error)
        return {"state": "FAILED", "error": str(error), "is_unreadable": True} | _recorded(folder)
    for key, kind in TYPES.items():
        if not isinstance(status.get(key), kind):
            status.pop(key, None)
    return status


def tell_unreadable(folder: Path, error: ValueError) -> None:
    """Print once per process that a record cannot be read.

    Args:
        folder: The folder of the record.
        error: The reason.
    """
    say_once(printable(f"{folder}: {error}"))


def is_finished(status: dict[str, Any], config_hash: str) -> bool:
    """Return whether a Run of this configuration is DONE and has no parts.

    Args:
        status: The status of the Run.
        config_hash: The hash of the configuration.
    """
    same = is_same(status.get("config_hash"), config_hash)
    return same and status["state"] == "DONE" and not status.get("parts")


def job_folders(root: Path) -> Iterator[Path]:
    """Yield the folders of Runs at and below a folder.

    Folders inside the folder of another Run are skipped.

    Args:
        root: The folder to search.

    Yields:
        The folders, sorted at each level.
    """
    for folder, below, files in os.walk(root):
        below.sort()
        if {"status.json", ELSEWHERE} & {*files, *below}:
            path = Path(folder)
            yield path
            if not (read_status(path) or {}).get("is_unreadable"):  # else it may not be a Run
                below.clear()


def find_run(root: Path, config_hash: str) -> Path | None:
    """Return the newest Run of this configuration; a DONE Run wins.

    Args:
        root: The folder to search.
        config_hash: The hash of the configuration.

    Returns:
        The folder of the Run, or None if there is none.
    """
    found = []
    for folder in job_folders(root):
        status = read_status(folder)
        if status is not None and is_same(status.get("config_hash"), config_hash):
            found.append((status["state"] == "DONE", start_of(status), folder))
    return max(found)[2] if found else None


def start_of(record: dict[str, Any]) -> datetime:
    """Return the start of a Run or a sweep.

    Args:
        record: The content of status.json or sweep.json.

    Returns:
        The time in UTC; the earliest possible time if the start is unknown.
    """
    return instant(record.get("start")) or datetime.min.replace(tzinfo=UTC)


def folder_lock(folder: Path) -> FileLock:
    """Return the lock of the folder of a Job. The system releases it when its process ends.

    Args:
        folder: The folder of the Job.
    """
    return FileLock(folder / ".lock")


def is_running(folder: Path) -> bool:
    """Return whether a process runs in a folder, possibly on another machine.

    Args:
        folder: The folder of the Job.
    """
    if not (folder / ".lock").exists():
        return False
    lock = folder_lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # .lock is not a file, or the file system is read-only
        return False
    lock.release()
    return False


def _recorded(folder: Path) -> dict[str, str]:
    try:
        return {"config_hash": config_hash(read_record(folder / "config.yaml"))}
    except (OSError, ValueError, TypeError, RecursionError):  # a date, or thousands of brackets
        return {}


def _node(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the group of a dotted key, or an empty group if it is missing, and the last part."""
    *groups, last = key.split(".")
    for group in groups:
        found = config.get(group)
        config = found if isinstance(found, dict) else {}
    return config, last


@functools.cache
def _digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
