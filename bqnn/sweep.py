"""A sweep's own record, sweep.json, and its table: what became of each of its jobs."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bqnn.files import write_json
from bqnn.status import ELSEWHERE, is_running, job_folders, read_status


@dataclass(frozen=True)
class JobRecord:
    """What a sweep says of a job.

    state: done, skipped (it was done before), refused (its folder was another job's), failed,
    interrupted, or running (elsewhere).
    """

    folder: str
    state: str
    seconds: float | None
    error: str | None


class Sweep:
    """The record of one launch of a multirun; jobs may run in other processes, on other machines.

    All that is known of them is read from their folders. `overrides` is the command, by which the
    same one is recognized; `num_jobs` is how many jobs it stands for, None where a sweeper decides
    that as it goes.
    """

    def __init__(
        self, folder: Path, verb: str, overrides: list[str], num_jobs: int | None, resume: bool
    ) -> None:
        self.folder = folder
        self.verb = verb
        self.overrides = overrides
        self.num_jobs = num_jobs
        self.resume = resume
        self.jobs: list[JobRecord] = []  # once it is finished
        self.started = datetime.now().astimezone()
        self._done_before = {f for f in _jobs_of(folder) if _state(f) == "done"}
        folder.mkdir(parents=True, exist_ok=True)
        self._write("RUNNING", None)

    def finish(self, error: str | None = None) -> bool:
        """Write down and print what became of all jobs; whether every one of them is done."""
        self.jobs = [self._record(folder) for folder in _jobs_of(self.folder)]
        finished = sum(job.state in ("done", "skipped") for job in self.jobs)
        all_done = error is None and finished == max(len(self.jobs), self.num_jobs or 0)
        self._write("DONE" if all_done else "FAILED", error)
        print(self._table())
        return all_done

    def _record(self, folder: Path) -> JobRecord:
        status = read_status(folder) or {}
        state = _state(folder)
        if state == "done" and (folder in self._done_before or not _is_below(folder, self.folder)):
            state = "skipped" if self.resume else "refused"
        seconds = None
        if status.get("end") is not None:
            span = datetime.fromisoformat(status["end"]) - datetime.fromisoformat(status["start"])
            seconds = round(span.total_seconds(), 1)
        shown = folder.relative_to(self.folder) if _is_below(folder, self.folder) else folder
        error = None if state in ("done", "skipped", "running") else status.get("error")
        return JobRecord(str(shown), state, seconds, error or _explain(state))

    def _table(self) -> str:
        width = max((len(job.folder) for job in self.jobs), default=0)
        lines = [f"\nsweep in {self.folder}: {self._summary()}"]
        for job in self.jobs:
            seconds = "" if job.seconds is None else f"{job.seconds:.1f} s"
            lines.append(
                f"  {job.state:<12}{seconds:>10}  {job.folder:<{width}}  {job.error or ''}"
            )
        return "\n".join(line.rstrip() for line in lines)

    def _summary(self) -> str:
        counts = Counter(job.state for job in self.jobs)
        counts["not started"] = max((self.num_jobs or 0) - len(self.jobs), 0)
        return (
            ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no jobs"
        )

    def _write(self, state: str, error: str | None) -> None:
        ended = None if state == "RUNNING" else datetime.now().astimezone().isoformat()
        record = {
            "state": state,
            "start": self.started.isoformat(),
            "end": ended,
            "error": error,
            "verb": self.verb,
            "overrides": self.overrides,
            "num_jobs": self.num_jobs,
            "jobs": [asdict(job) for job in self.jobs],
        }
        write_json(self.folder / "sweep.json", record)


def record_refused_sweep(folder: Path, error: str) -> None:
    """Leave a sweep.json about a command line that could not become a sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "sweep.json").exists():
        now = datetime.now().astimezone().isoformat()
        record = {"state": "FAILED", "start": now, "end": now, "error": error, "jobs": []}
        write_json(folder / "sweep.json", record)


def find_sweep(root: Path, verb: str, overrides: list[str]) -> Path | None:
    """The newest folder directly below `root` in which this command was run as a sweep."""
    found = []
    for path in root.glob("*/sweep.json"):
        record: dict[str, Any] = json.loads(path.read_text())
        if (record.get("verb"), record.get("overrides")) == (verb, overrides):
            found.append((record["start"], path.parent))
    return max(found)[1] if found else None


def _jobs_of(sweep: Path) -> list[Path]:
    """The folders of a sweep's jobs, in the order of their numbers, wherever they are."""

    def number(folder: Path) -> tuple[int, str]:
        first = folder.name.partition("_")[0]
        return (int(first) if first.isdigit() else 0, folder.name)

    folders = sorted(job_folders(sweep), key=number)
    return [_elsewhere(folder) or folder for folder in folders]


def _elsewhere(folder: Path) -> Path | None:
    """Where the job is that this folder of a sweep stands for, if it is not here."""
    if (folder / "status.json").exists():
        return None
    return Path(json.loads((folder / ELSEWHERE).read_text())["folder"])


def _state(folder: Path) -> str:
    status = read_status(folder)
    if status is None:
        return "interrupted"  # it was removed
    if status["state"] == "RUNNING":
        return "running" if is_running(folder) else "interrupted"
    return str(status["state"]).lower()


def _explain(state: str) -> str | None:
    return {
        "interrupted": "its process was killed",
        "running": "by another process",
        "refused": "its folder holds an earlier job; give another hydra.sweep.dir, or resume=true",
    }.get(state)


def _is_below(folder: Path, root: Path) -> bool:
    return root in folder.parents
