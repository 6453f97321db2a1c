"""Resume a Job: find the folder of its Run, log into it, and name the command that resumes it."""

import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import configure_log
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf, read_write

from bqnn.files import write_json
from bqnn.jobs.command_line.arguments import quoted
from bqnn.jobs.command_line.configuration import is_given
from bqnn.jobs.folder import OUTPUTS, fresh_folder
from bqnn.jobs.identity import config_hash, is_prolonged, is_same
from bqnn.jobs.runs import ELSEWHERE, find_run
from bqnn.jobs.status import read_status
from bqnn.jobs.typed import command


def folder_to_resume(config: dict[str, Any]) -> Path:
    """Return the folder of the newest Run of a resumed Job, or the folder that Hydra chose.

    With `hydra.run.dir` or `hydra.sweep.dir` on the command line, only that folder is searched.

    Args:
        config: The resolved configuration of the Job.
    """
    hydra_config, key = HydraConfig.get(), config_hash(config)
    own = Path(hydra_config.runtime.output_dir)
    status = read_status(own)
    if status is not None and (
        status.config_hash is None  # it was killed before its configuration was set
        or is_same(status.config_hash, key)
        or is_prolonged(own, config)
    ):
        return own
    if hydra_config.mode == RunMode.RUN:
        found = None if is_given("hydra.run.dir", hydra_config) else find_run(OUTPUTS, key)
        if found is not None:
            own.rmdir()
        return found or own
    if status is not None:  # the folder of another Job: the sweep has changed
        own = Path(fresh_folder(str(own)))
    found = find_run(Path(hydra_config.sweep.dir), key)
    if found is not None:
        own.rmdir()
    elif not is_given("hydra.sweep.dir", hydra_config):
        found = find_run(OUTPUTS, key)
        if found is not None:
            write_json(own / ELSEWHERE, {"folder": str(found.absolute())})
    return found or own


def log_into(folder: Path) -> None:
    """Move the log file of Hydra to another folder.

    Args:
        folder: The folder of the Run that is resumed.
    """
    config: Any = HydraConfig.instance().cfg
    if Path(config.hydra.runtime.output_dir) == folder:
        return
    with read_write(config.hydra):
        config.hydra.runtime.output_dir = str(folder)
        config.hydra.run.dir = str(folder)  # Lightning passes it to its processes
    # Copy the configuration: the one of Hydra refers to its parent, and in a sweep it has already
    # resolved the name of the file.
    copy = OmegaConf.create({"hydra": OmegaConf.to_container(config.hydra)})
    file = OmegaConf.select(copy, "hydra.job_logging.handlers.file")
    if file is not None:
        file.filename = str(folder / f"{config.hydra.job.name}.log")
    configure_log(copy.hydra.job_logging, copy.hydra.verbose)


def resume_command(verb: str, key: str, folder: Path) -> str:
    """Return the command line of this process with options to resume in a folder.

    Args:
        verb: The name of the program.
        key: `hydra.run.dir` or `hydra.sweep.dir`.
        folder: The folder.
    """
    arguments = [a for a in sys.argv[1:] if not a.startswith(("resume=", f"{key}="))]
    given = f"{key}={folder}"
    try:
        is_plain = OverridesParser.create().parse_override(given).value() == str(folder)
    except HydraException:
        is_plain = False
    given = given if is_plain else quoted(key, str(folder))
    return shlex.join([*command(verb), *arguments, "resume=true", given])
