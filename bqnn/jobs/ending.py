"""End a Job: write its status, run its actions, unlock its folder, print its messages."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from bqnn.jobs.interruption import Interruption, is_interruption
from bqnn.jobs.status import read_status
from bqnn.jobs.terminal import describe, log_traceback, say
from bqnn.jobs.typed import program
from bqnn.text import one_line

if TYPE_CHECKING:
    from bqnn.jobs.job import Job


class Ending:
    """The end of a Job: success, failure or interruption.

    The steps follow each other in the order of the first line of this file. A failure of one step
    does not prevent the next. From the start, signals interrupt the Job.

    Args:
        job: The Job, which has not been entered yet.
    """

    def __init__(self, job: "Job") -> None:
        self._job = job
        self._interruption = Interruption()
        self._messages: list[str] = []
        self._undo = ExitStack()  # closed in reverse order
        self._undo.callback(self._say_messages)
        self._undo.enter_context(_no_errors_of_logging())
        self._undo.enter_context(self._interruption.handled(self._record_interruption))
        self._undo.callback(job.release)

    def end(self, error: BaseException | None) -> bool:
        """End the Job.

        Args:
            error: The exception that the Job raised, or None.

        Returns:
            Whether the Job failed. Its failure is then recorded and printed.

        Raises:
            SystemExit: The Job was interrupted (code 130).
        """
        self._interruption.settle()
        with self._undo:
            for action in self._job.actions:
                self._undo.callback(self._run, action)
            self._conclude(error)
        if self._job.state == "INTERRUPTED" or self._interruption.is_requested:
            raise SystemExit(130) from error
        return isinstance(error, Exception)

    def _conclude(self, error: BaseException | None) -> None:
        """Set the final state, and write it and the traceback of a failure."""
        job, status, is_recorded = self._job, self._job.status, self._job.is_claimed
        if error is None:
            status.state, status.error = "DONE", None
        elif self._interruption.is_requested or is_interruption(error):
            status.state, status.error = "INTERRUPTED", "interrupted"
            if job.resume_command is not None and job.rank == 0:
                self._tell("interrupted; resume it with")
                self._messages.append(f"  {job.resume_command}")
        else:
            status.state, status.error = "FAILED", describe(error)
            process = f" (process {job.rank})" if job.rank > 0 else ""
            self._tell(f"{status.error} [{one_line(str(job.folder))}]", process)
            if job.rank > 0:  # unless the first process has recorded the end already
                first = read_status(job.folder)
                is_recorded = first is not None and first.state == "RUNNING"
        if is_recorded:
            self._write_status()
            if error is not None and status.state == "FAILED":
                log_traceback(f"{job.verb} failed", error)

    def _write_status(self) -> None:
        status = self._job.status
        try:
            status.write(self._job.folder)
        except Exception as unwritable:  # status.json is unchanged; report the first failure
            if status.state != "FAILED":
                self._tell(describe(unwritable))
            if status.state == "DONE":
                status.state = "FAILED"

    def _run(self, action: Callable[[int], None]) -> None:
        try:
            action(0 if self._job.state == "DONE" else 1)
        except (Exception, KeyboardInterrupt, SystemExit) as failure:
            # The status is already written. The remaining actions run.
            self._interruption.is_requested |= is_interruption(failure)
            log_traceback("after the end of the job", failure)
            self._tell(f"after the end of the job: {describe(failure)}")

    def _record_interruption(self) -> None:
        job = self._job
        if job.is_claimed and job.state == "RUNNING":
            job.status.state, job.status.error = "INTERRUPTED", "interrupted"
            job.status.write(job.folder)

    def _tell(self, message: str, process: str = "") -> None:
        self._messages.append(f"{program(self._job.verb)}{process}: {message}")

    def _say_messages(self) -> None:
        for line in self._messages:
            say(line, error=True)


@contextmanager
def _no_errors_of_logging() -> Iterator[None]:
    """Print no errors of logging: with a full disk, they would be fifty lines per record."""
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    finally:
        logging.raiseExceptions = before
