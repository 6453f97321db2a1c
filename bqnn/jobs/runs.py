"""Find the Runs below a folder."""

import os
from collections.abc import Iterator
from pathlib import Path

from bqnn.jobs.identity import is_same
from bqnn.jobs.status import LONG_AGO, RunStatus, read_status

ELSEWHERE = "elsewhere.json"  # in a sweep, links to the older folder that holds the Job


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
            status = read_status(path)
            if status is None or not status.is_unreadable:  # else it may not be a Run
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
        if status is not None and is_same(status.config_hash, config_hash):
            found.append((status.state == "DONE", status.start or LONG_AGO, folder))
    return max(found)[2] if found else None


def is_finished(status: RunStatus | None, config_hash: str) -> bool:
    """Return whether a Run of this configuration is DONE and has no parts.

    Args:
        status: The status of the Run, or None if there is no Run.
        config_hash: The hash of the configuration.
    """
    return (
        status is not None
        and is_same(status.config_hash, config_hash)
        and status.state == "DONE"
        and not status.has_parts
    )
