"""status.json: what a job says of itself, and how an earlier run is recognized by it."""

import hashlib
import json
import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

# What results do not depend on: runs that differ in nothing else are the same run.
WITHOUT_EFFECT = ("resume", "logger", "data_dir", "trainer.threads", "trainer.progress_bar")
ELSEWHERE = "elsewhere.json"  # in a sweep, in place of a job that an older folder holds


def config_hash(config: dict[str, Any]) -> str:
    """What two resolved configurations share exactly when they give the same results."""
    kept = deepcopy(config)
    for key in WITHOUT_EFFECT:
        *groups, last = key.split(".")
        node = kept
        for group in groups:
            node = node.get(group, {})
        node.pop(last, None)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def read_status(folder: Path) -> dict[str, Any] | None:
    """The content of a job's status.json; None where no job is."""
    path = folder / "status.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:  # one such file is not to stop all that look around here
        return {"state": "FAILED", "start": "", "error": f"{path} cannot be read: {error}"}


def is_finished(status: dict[str, Any], config_hash: str) -> bool:
    """Whether the job is this one, is done, and is not one of parts that may have become more."""
    same = status.get("config_hash") == config_hash
    return same and status["state"] == "DONE" and not status.get("parts")


def job_folders(root: Path) -> Iterator[Path]:
    """The folders of jobs at and below `root`, in order; what is below a job's is its own."""
    for folder, below, files in os.walk(root):
        if "status.json" in files or ELSEWHERE in files:
            below.clear()
            yield Path(folder)
        below.sort()


def find_run(root: Path, config_hash: str) -> Path | None:
    """The newest run of this configuration below `root`, before which comes any that is DONE."""
    found = []
    for folder in job_folders(root):
        status = read_status(folder)
        if status is not None and status.get("config_hash") == config_hash:
            found.append((status["state"] == "DONE", status["start"], folder))
    return max(found)[2] if found else None


def folder_lock(folder: Path) -> FileLock:
    """The lock that a job holds on its folder while it runs; it ends with the process."""
    return FileLock(folder / ".lock")


def is_running(folder: Path) -> bool:
    """Whether a process, here or on another machine with this file system, is at work there."""
    if not (folder / ".lock").exists():
        return False
    lock = folder_lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
