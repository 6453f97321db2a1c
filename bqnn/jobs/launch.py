"""Launch the Jobs of a command line, and exit with a code for their outcome."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bqnn.jobs.command_line.arguments import UsageError, read_arguments, refuse_malformed
from bqnn.jobs.command_line.callback import Launch, StoppedError, launching
from bqnn.jobs.command_line.configuration import config_dir, located
from bqnn.jobs.command_line.messages import explain
from bqnn.jobs.command_line.own import choose_own
from bqnn.jobs.command_line.refusals import Check
from bqnn.jobs.command_line.resuming import folder_to_resume, log_into, resume_command
from bqnn.jobs.interruption import sigterm_as_interrupt
from bqnn.jobs.job import Job
from bqnn.jobs.objective import objective_values
from bqnn.jobs.secrets import refuse_secrets
from bqnn.jobs.terminal import protect_output, say, say_once
from bqnn.jobs.typed import program


def launch(task: Callable[[Job], None], verb: str, check: Check | None = None) -> None:
    """Run a task once, or for every Job of a multirun, and exit.

    An invalid command line gives an error of one line and leaves no files. A failed Job prints one
    line and records it in its status.json. A multirun continues with the next Job, and ends with a
    table and sweep.json.

    Args:
        task: Called with each Job.
        verb: The name of the program. The configuration is conf/<verb>.yaml.
        check: Raises ValueError for an invalid configuration. It is called, before any file is
            written, with the configuration and whether it is a multirun. In a multirun it is
            called again for each Job.

    Raises:
        SystemExit: With code 1 if the command line is invalid or a Job is not done, 2 for an
            unknown option, and 130 for an interruption. If all Jobs are done, the function
            returns, and the exit code is 0.
    """
    protect_output()
    say_once.cache_clear()
    # Hydra then raises its errors, and `launch` prints them in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    states = []

    def run(cfg: DictConfig) -> float | list[float] | None:
        state, values = run_job(cfg, task, verb, check)
        states.append(state)
        # Return None instead of raising: Hydra would not launch the remaining Jobs.
        if state != "DONE":
            return None
        return values if len(values) > 1 else next(iter(values), None)

    with launching(check) as launched, sigterm_as_interrupt():
        try:
            refuse_secrets({"the command line": sys.argv[1:]}, references=False)
            refuse_malformed(read_arguments(), verb)
            if verb == "train":
                sys.argv[1:] = choose_own(sys.argv[1:])
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=verb)(run)()
        except UsageError as error:
            say(f"{program(verb)}: {error}", error=True)
            sys.exit(2)
        except StoppedError as stop:
            _fail(stop.error, verb, launched)
        except (KeyboardInterrupt, SystemExit) as stop:
            if isinstance(stop, SystemExit) and stop.code != 130:
                raise
            launched.finish("interrupted")
            sys.exit(130)
        except Exception as error:  # from Hydra or a launcher; a Job handles its own
            _fail(error, verb, launched)
    if any(state != "DONE" for state in states):
        sys.exit(1)


def run_job(
    cfg: DictConfig, task: Callable[[Job], None], verb: str, check: Check | None = None
) -> tuple[str, list[float]]:
    """Run one Job in the folder that Hydra chose, or in the folder of the Run that it resumes.

    Args:
        cfg: The composed configuration.
        task: Called with the Job.
        verb: The name of the program.
        check: Called for a Job of a multirun; a single Job is checked before it has a folder.

    Returns:
        The state of the Job, one of `bqnn.jobs.status.STATES`, and the objectives of a sweep.
    """
    protect_output()  # this may be a process of a launcher
    hydra_config = HydraConfig.get()
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    sweep = Path(hydra_config.sweep.dir).name if is_sweep else None
    resume, values = bool(OmegaConf.select(cfg, "resume")), []
    with Job(Path(hydra_config.runtime.output_dir), verb, sweep) as job:
        try:
            config = located(cfg)
        except (ValueError, OSError):
            if is_sweep:  # the table of the sweep lists this Job, too
                with suppress(FileExistsError):
                    job.claim()
            raise
        if resume:
            job.folder = folder_to_resume(config)
            log_into(job.folder)
        if not is_sweep:
            job.resume_command = resume_command(verb, "hydra.run.dir", job.folder)
        if job.take(config, resume):
            if is_sweep and check is not None:
                check(config, is_sweep)
            task(job)
        else:
            say(f"done before: {job.folder}")
        if is_sweep:
            values = objective_values(job.folder, config.get("objective", []))
    return job.state, values


def _fail(error: Exception, verb: str, launched: Launch) -> NoReturn:
    """Print why the launch ended early, and exit."""
    message = explain(error, verb)
    launched.finish(message)
    say(f"{program(verb)}: {message}", error=True)
    sys.exit(1)
