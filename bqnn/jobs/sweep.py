"""Record a sweep in sweep.json and print the table of its Jobs."""

from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from bqnn.files import write_json
from bqnn.jobs.folder import is_running
from bqnn.jobs.records import instant, read_record
from bqnn.jobs.runs import ELSEWHERE, job_folders
from bqnn.jobs.status import LONG_AGO, STATES, read_status, tell_unreadable
from bqnn.jobs.terminal import say
from bqnn.jobs.typed import program
from bqnn.text import one_line, printable, short


@dataclass(frozen=True)
class JobRecord:
    """The record of a Job in its sweep.

    Args:
        folder: The folder of the Job, relative to the sweep if it is below it.
        state: "done", "skipped" (done before), "refused" (the folder holds an earlier Job),
            "failed", "interrupted" or "running" (in another process).
        seconds: The duration in seconds, or None if it is unknown.
        error: The reason if the Job is not done, or None.
    """

    folder: str
    state: str
    seconds: float | None
    error: str | None


class Sweep:
    """The record of a multirun.

    The Jobs may run in other processes and on other machines. Their states are read from their
    folders.

    Args:
        folder: The folder of the sweep.
        verb: The name of the program, such as "train".
        overrides: The command line, which identifies the sweep when it is resumed.
        num_jobs: The number of Jobs, or None if the sweeper decides it during the sweep.
        resume: Whether Jobs that were done before are skipped.
    """

    def __init__(
        self, folder: Path, verb: str, overrides: list[str], num_jobs: int | None, resume: bool
    ) -> None:
        self.folder = folder
        self.verb = verb
        self.overrides = overrides
        self.num_jobs = num_jobs
        self.resume = resume
        self.jobs: list[JobRecord] = []  # filled by `finish`
        self.started = datetime.now().astimezone()
        self._done_before = {f for f in _jobs_of(folder) if _state(f) == "done"}
        folder.mkdir(parents=True, exist_ok=True)
        self._write("RUNNING", None)

    def finish(self, error: str | None = None) -> bool:
        """Record and print the results of all Jobs.

        Args:
            error: Why the sweep ended early, or None.

        Returns:
            Whether all Jobs are done and the record could be written.
        """
        self.jobs = [self._record(folder) for folder in _jobs_of(self.folder)]
        finished = sum(job.state in ("done", "skipped") for job in self.jobs)
        all_done = error is None and finished == max(len(self.jobs), self.num_jobs or 0)
        try:
            self._write("DONE" if all_done else "FAILED", error)
        except OSError as unwritable:  # the disk is full, or the folder was removed
            all_done = False
            say(f"{program(self.verb)}: {one_line(str(unwritable))}", error=True)
        say(self._table())
        return all_done

    def _record(self, folder: Path) -> JobRecord:
        status, state = read_status(folder), _state(folder)
        if state == "done" and (folder in self._done_before or not _is_below(folder, self.folder)):
            state = "skipped" if self.resume else "refused"
        seconds = error = None
        if status is not None and status.start is not None and status.end is not None:
            seconds = round((status.end - status.start).total_seconds(), 1)
        if status is not None and state not in ("done", "skipped", "running"):
            error = status.error
        shown = folder.relative_to(self.folder) if _is_below(folder, self.folder) else folder
        return JobRecord(str(shown), state, seconds, error or _odd_link(folder) or _explain(state))

    def _table(self) -> str:
        width = max((len(job.folder) for job in self.jobs), default=0)
        lines = ["", f"sweep in {self.folder}: {self._summary()}"]
        for job in self.jobs:
            seconds = "" if job.seconds is None else f"{job.seconds:.1f} s"
            lines.append(
                f"  {job.state:<12}{seconds:>10}  {job.folder:<{width}}  {job.error or ''}"
            )
        return "\n".join(printable(line.rstrip()) for line in lines)

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


def find_sweep(root: Path, verb: str, overrides: list[str]) -> Path | None:
    """Return the newest sweep of a command.

    Args:
        root: The folder whose subfolders are searched.
        verb: The name of the program.
        overrides: The command line of the sweep.

    Returns:
        The folder of the sweep, or None if there is none.
    """
    found = []
    for path in root.glob("*/sweep.json"):
        try:
            record = read_record(path)
            if record.get("state") not in STATES:
                raise ValueError(f"sweep.json has the state {short(record.get('state'))}")
        except FileNotFoundError:  # the folder was removed in the meantime
            continue
        except ValueError as error:
            tell_unreadable(path.parent, error)
            continue
        if (record.get("verb"), record.get("overrides")) == (verb, overrides):
            found.append((instant(record.get("start")) or LONG_AGO, path.parent))
    return max(found)[1] if found else None


def _jobs_of(sweep: Path) -> list[Path]:
    """Return the folders of the Jobs of a sweep, sorted by number, after following links."""

    def number(folder: Path) -> tuple[int, str]:
        first = folder.name.partition("_")[0]
        return (int(first) if first.isdecimal() else 0, folder.name)

    folders = sorted(job_folders(sweep), key=number)
    return [folder if _odd_link(folder) else _elsewhere(folder) for folder in folders]


def _elsewhere(folder: Path) -> Path:
    """Follow the link in a folder of a sweep; raise ValueError if the link is invalid."""
    if (folder / "status.json").exists():
        return folder
    try:
        there = read_record(folder / ELSEWHERE).get("folder")
    except FileNotFoundError:
        return folder
    if not isinstance(there, str) or "\0" in there:
        raise ValueError(f"{ELSEWHERE} names the folder {short(there)}")
    return Path(there)


def _odd_link(folder: Path) -> str | None:
    """Print and return why the link in a folder is invalid; return None if it is valid."""
    try:
        _elsewhere(folder)
    except ValueError as error:
        tell_unreadable(folder, error)
        return str(error)
    return None


def _state(folder: Path) -> str:
    status = read_status(folder)
    if status is None:
        return "interrupted"  # the folder was removed
    if status.state == "RUNNING":
        return "running" if is_running(folder) else "interrupted"
    return status.state.lower()


def _explain(state: str) -> str | None:
    return {
        "interrupted": "its process was killed",
        "running": "by another process",
        "refused": "its folder holds an earlier job; give another hydra.sweep.dir, or resume=true",
    }.get(state)


def _is_below(folder: Path, root: Path) -> bool:
    return root in folder.parents
