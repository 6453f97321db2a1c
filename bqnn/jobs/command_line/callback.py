"""The Hydra callback that refuses invalid configurations, and starts and ends a sweep."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from bqnn.jobs.command_line.configuration import is_given, names_sweep_folder, sweep_jobs
from bqnn.jobs.command_line.refusals import Check, refuse_run, refuse_sweep
from bqnn.jobs.command_line.resuming import resume_command
from bqnn.jobs.folder import OUTPUTS, fresh_folder
from bqnn.jobs.identity import WITHOUT_EFFECT
from bqnn.jobs.interruption import end_with
from bqnn.jobs.sweep import Sweep, find_sweep
from bqnn.jobs.terminal import describe, say


@dataclass
class Launch:
    """The launch of this process, which a context variable passes to the callback of Hydra.

    Args:
        check: The check of the verb, or None.
        sweep: The record of the multirun, from its start on, or None.
    """

    check: Check | None
    sweep: Sweep | None = None

    def finish(self, error: str | None = None) -> bool:
        """Print the results of the sweep, if there is one, and the command that completes it.

        Args:
            error: Why the sweep ended early, or None.

        Returns:
            Whether all Jobs are done.
        """
        if self.sweep is None:
            return error is None
        all_done = self.sweep.finish(error)
        if not all_done and self.sweep.jobs:
            command = resume_command(self.sweep.verb, "hydra.sweep.dir", self.sweep.folder)
            say(f"\nfor what is missing:\n  {command}")
        return all_done


_LAUNCH: ContextVar[Launch] = ContextVar("launch")


@contextmanager
def launching(check: Check | None) -> Iterator[Launch]:
    """Pass a check to the callback that Hydra creates within this context.

    Args:
        check: The check of the verb, or None.

    Yields:
        The launch, to which the callback adds the sweep of a multirun.
    """
    token = _LAUNCH.set(Launch(check))
    try:
        yield _LAUNCH.get()
    finally:
        _LAUNCH.reset(token)


class StoppedError(SystemExit):
    """End Hydra from within a callback; Hydra would only warn of other exceptions."""

    def __init__(self, error: Exception) -> None:
        super().__init__(describe(error))
        self.error = error


def _final(hook: Callable[..., None]) -> Callable[..., None]:
    """Decorate a callback so that an exception in it ends the process."""

    @functools.wraps(hook)
    def guarded(self: Callback, config: DictConfig, **options: Any) -> None:
        try:
            hook(self, config, **options)
        except Exception as error:
            raise StoppedError(error) from error

    return guarded


class SweepCallback(Callback):
    """Refuse invalid configurations before any file is written, and record a sweep.

    Hydra creates it, because conf/<verb>.yaml names it, and pickles it for the processes of
    launchers.
    """

    launched_from: int | None = None  # the ID of the process that launches the sweep

    @_final
    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        refuse_run(config, _LAUNCH.get().check)
        if not is_given("hydra.run.dir", config.hydra):
            config.hydra.run.dir = fresh_folder(config.hydra.run.dir)

    @_final
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        launch, jobs = _LAUNCH.get(), sweep_jobs(config)
        refuse_sweep(config, jobs, launch.check)
        verb, resume = config.hydra.job.config_name, bool(OmegaConf.select(config, "resume"))
        overrides = [
            override
            for override in config.hydra.overrides.task
            if not override.lstrip("+~").startswith(WITHOUT_EFFECT)
        ]
        folder = _sweep_folder(config, verb, overrides, resume)
        _set_sweep_folder(config, folder)
        launch.sweep = Sweep(folder, verb, overrides, None if jobs is None else len(jobs), resume)
        self.launched_from = os.getpid()

    @_final
    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        # A Job may run in another process. Those of joblib would continue after a kill -9.
        is_joblib = config.hydra.launcher._target_.endswith(".JoblibLauncher")
        if is_joblib and self.launched_from not in (None, os.getpid()):
            end_with(parent=self.launched_from)

    @_final
    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if not _LAUNCH.get().finish():
            sys.exit(1)


def _sweep_folder(config: DictConfig, verb: str, overrides: list[str], resume: bool) -> Path:
    """Return the folder of the sweep to resume, the folder that the user chose, or a new one."""
    name = config.hydra.sweep.dir
    if names_sweep_folder(config):
        return Path(name).absolute()
    found = find_sweep(OUTPUTS / verb, verb, overrides) if resume else None
    return (found or Path(fresh_folder(name))).absolute()


def _set_sweep_folder(config: DictConfig, folder: Path) -> None:
    """Set the folder of the sweep for all Jobs.

    They compose their configuration again, possibly in another working directory. The prefix `++`
    marks the override, so that `is_given` reports only overrides of the user.
    """
    prefix = "" if names_sweep_folder(config) else "++"
    escaped = str(folder).replace("'", "\\'")
    config.hydra.overrides.hydra.append(f"{prefix}hydra.sweep.dir='{escaped}'")
    config.hydra.sweep.dir = str(folder)
