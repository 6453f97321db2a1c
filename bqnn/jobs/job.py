"""A Job: its folder, its configuration, its status, and its place among other processes."""

import itertools
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from bqnn.files import write_text
from bqnn.jobs.claim import Claim, claim_again, claim_unused
from bqnn.jobs.ending import Ending
from bqnn.jobs.ranks import ALONE, find_place, hide_launcher
from bqnn.jobs.secrets import refuse_secrets
from bqnn.jobs.status import JobStatus, read_status

# The starts of the Jobs of this process. The first one starts with the process and its imports.
_STARTS = itertools.chain([time.perf_counter()], iter(time.perf_counter, None))


class Job:
    """A context manager that runs one Job in its own folder.

    The Job writes config.yaml and status.json. The state in status.json is RUNNING, then DONE,
    FAILED or INTERRUPTED. The folder is locked while the Job runs; the lock ends with its process.

    The context does not propagate exceptions. It writes the traceback to the log, and one line to
    the terminal and to status.json. Only an interruption propagates, as SystemExit(130).
    `bqnn.jobs.ending.Ending` has the steps of the end.

    If several processes train one model, the first process writes. The others record only a
    failure, because Lightning kills the first process when another one fails.

    Args:
        folder: The folder of the Job.
        verb: The name of the program, such as "train".
        sweep: The name of the multirun that the Job is part of, or None.
        resume_command: The command that an interrupted Job prints for the user, or None.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, Job(Path(folder), "train") as job:
        ...     is_taken = job.take({"seed": 0}, resume=False)
        >>> is_taken, job.state
        (True, 'DONE')
    """

    def __init__(
        self, folder: Path, verb: str, sweep: str | None = None, resume_command: str | None = None
    ) -> None:
        self.folder = folder
        self.verb = verb
        self.sweep = sweep
        self.resume_command = resume_command
        self.config: dict[str, Any] = {}
        self.status = JobStatus()
        self.rank, self.launcher = ALONE
        self.is_resumed = False
        self.is_prolonged = False  # a training resumed with more epochs
        self.actions: list[Callable[[int], None]] = []
        self._claim: Claim | None = None
        self._started = next(_STARTS)

    @property
    def state(self) -> str:
        """One of `bqnn.jobs.status.STATES`."""
        return self.status.state

    @property
    def is_claimed(self) -> bool:
        """Whether this process has locked the folder and writes its files."""
        return self._claim is not None

    def seconds(self) -> float:
        """Return the seconds since the Job started; for the first Job, since the process did."""
        return time.perf_counter() - self._started

    def at_end(self, action: Callable[[int], None]) -> None:
        """Register an action for the end of the Job. Actions run in reverse order.

        Args:
            action: Called with the exit code, 0 if the Job is DONE and 1 otherwise.
        """
        self.actions.append(action)

    def claim(self) -> None:
        """Lock the folder and write the first status.

        Raises:
            FileExistsError: The folder holds an earlier Job, or a file that the Job would
                overwrite. The folder is unchanged.
            BlockingIOError: Another process runs in the folder.
        """
        self._claim = claim_unused(self.folder)
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
            self.status.keep_id(read_status(self.folder))
            self.configure(config)
            return True
        if not resume:
            self.claim()
            self.configure(config)
            return True
        claim = claim_again(self.folder, config, may_be_prolonged=self.verb == "train")
        if claim is None:
            return False
        self._claim = claim
        self.is_resumed, self.is_prolonged = claim.is_resumed, claim.is_prolonged
        self.status.keep_id(claim.earlier)
        self.configure(config)
        return True

    def configure(self, config: dict[str, Any]) -> None:
        """Set the configuration and write it to config.yaml.

        Args:
            config: The resolved configuration.

        Raises:
            ValueError: The configuration holds a secret of the environment.
        """
        refuse_secrets(config)
        self.config = config
        self.status.identify(config)
        if self.rank == 0:
            write_text(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
            self._write_status()

    def record_epoch(self, epoch: int) -> None:
        """Record where a resumed training continues.

        Args:
            epoch: The first epoch to train, from 0.
        """
        self.status.resumed_from_epoch = epoch
        self._write_status()

    def release(self) -> None:
        """Unlock the folder. A process that is not the first removes its own, empty folder."""
        if self._claim is not None:
            self._claim.lock.close()
        elif self.rank > 0:
            with suppress(OSError):  # not empty, or the folder of the first process
                self.folder.rmdir()

    def __enter__(self) -> "Job":
        self._ending = Ending(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        try:
            return self._ending.end(error)
        finally:
            del self._ending  # it refers to the Job: without the cycle, memory is freed at once

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

    def _write_status(self) -> None:
        if self.is_claimed:
            self.status.write(self.folder)
