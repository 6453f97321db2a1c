"""Run a Job in parts: one for each checkpoint that matches its pattern."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bqnn.jobs.identity import config_hash, is_same
from bqnn.jobs.job import Job
from bqnn.jobs.status import read_status
from bqnn.text import valid_name


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
    parts = job.status.parts
    failed = []
    for config in configs:
        part = Job(_part_folder(job.folder, config), job.verb, job.sweep or job.folder.name)
        part.folder.mkdir(exist_ok=True)
        parts.append(part.folder.name)
        with part:
            if part.take(config, resume):
                task(part)
        if part.state != "DONE":
            failed.append(part.folder.name)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(parts)} failed: {', '.join(failed)}")


def _part_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Return the folder of an earlier part with this configuration, or a new folder."""
    key = config_hash(config)
    taken = [path for path in folder.iterdir() if (path / "status.json").exists()]
    for path in taken:
        status = read_status(path)
        if status is not None and is_same(status.config_hash, key):
            return path
    is_known = "method" in config  # unknown if the checkpoint is unreadable
    name = f"{config['method']['name']}_{config['task']['name']}" if is_known else "unreadable"
    name = valid_name(name)  # an untrusted name; 200 letters can take 800 bytes
    numbers = itertools.count(len(taken))
    folders = (folder / f"{number}_{name}" for number in numbers)
    return next(path for path in folders if not path.exists())
