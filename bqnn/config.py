"""The command line: Hydra in front, plain dictionaries behind; only here is OmegaConf known."""

import contextlib
import functools
import math
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import configure_log
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from bqnn.files import write_json
from bqnn.run import Job, describe, end_with, record_refusal
from bqnn.secrets import refuse_secrets
from bqnn.status import ELSEWHERE, WITHOUT_EFFECT, config_hash, find_run, is_same, read_status
from bqnn.sweep import Sweep, find_sweep, record_refused_sweep
from bqnn.terminal import protect_output, say, say_once

# Keys with numbers that would otherwise fail far from here: their kind and the least value.
NUMBERS: dict[str, tuple[type, int]] = {
    "seed": (int, 0),
    "task.batch_size": (int, 1),
    "task.validation_share": (float, 0),
    "trainer.max_epochs": (int, 1),
    "trainer.check_val_every_n_epoch": (int, 1),
    "trainer.save_every": (float, 0),
    "trainer.threads": (int, 1),
    "method.num_samples": (int, 1),
    "method.val_samples": (int, 1),
    "method.optimizer.lr": (float, 0),
    "num_samples": (int, 1),
    "quant.freeze_epochs": (int, 0),
    "quant.fine_tuning.seed": (int, 0),
    "quant.fine_tuning.calibration_batches": (int, 1),
    "quant.fine_tuning.prior_weight": (float, 0),
    "quant.fine_tuning.optimizer.lr": (float, 0),
}

CONF = Path(__file__).resolve().parents[1] / "conf"
OUTPUTS = Path("outputs")


def launch(task: Callable[[Job], None], verb: str) -> None:
    """Run `task(job)` once, or for every job of a multirun, and exit.

    `conf/<verb>.yaml` is the configuration. What fails says so in one line and in its
    status.json; a multirun goes on with the next job, and ends with a table and sweep.json. The
    exit code is 0 when every job is done.
    """
    protect_output()
    say_once.cache_clear()
    # Hydra then hands its errors to us, and we say them in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    states = []
    SweepCallback.sweep = None

    def run(cfg: DictConfig) -> float | None:
        state = run_job(cfg, task, verb)
        states.append(state)
        # Hydra would not launch the rest of a multirun after an exception.
        return None if state == "DONE" else float("nan")

    with _sigterm_as_interrupt():
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=verb)(run)()
        except (KeyboardInterrupt, SystemExit) as stop:
            if isinstance(stop, SystemExit) and stop.code != 130:
                raise
            if SweepCallback.sweep is not None:
                SweepCallback.finish("interrupted")
            sys.exit(130)
        except Exception as error:  # of Hydra or a launcher: a job keeps its own to itself
            is_sweep = {"-m", "--multirun"} & set(sys.argv)
            message = _one_line(error) + (_hint_for_sweep(error) if is_sweep else "")
            if SweepCallback.sweep is not None:
                SweepCallback.finish(message)
            elif not _asks_only(sys.argv[1:]):
                record = record_refused_sweep if is_sweep else record_refusal
                with contextlib.suppress(OSError):  # the folder may be what was wrong
                    record(_refused_folder(verb, sys.argv[1:]), message)
            sys.exit(f"{verb}.py: {message}")
    if any(state != "DONE" for state in states):
        sys.exit(1)


def run_job(cfg: DictConfig, task: Callable[[Job], None], verb: str) -> str:
    """Run one job in the folder that Hydra made, or that of the run it resumes: its state."""
    protect_output()  # it may be a process of a launcher
    hydra_config = HydraConfig.get()
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    resume = bool(OmegaConf.select(cfg, "resume"))
    job = Job(Path(hydra_config.runtime.output_dir), verb)
    if is_sweep:
        job.sweep = Path(hydra_config.sweep.dir).name
    with job:
        try:
            config = plain(cfg)
        except ValueError:
            with contextlib.suppress(FileExistsError):  # what is wrong with the values comes first
                job.claim()
            raise
        if resume:
            job.folder = _folder_to_resume(config_hash(config))
            _log_into(job.folder)
        if not is_sweep:
            job.resume_command = _resume_command("hydra.run.dir", job.folder)
        if job.take(config, resume):
            task(job)
        else:
            say(f"done before: {job.folder}")
    return job.state


def _final(hook: Callable[..., None]) -> Callable[..., None]:
    """Have an exception in a callback end the process: Hydra would warn of it, and go on."""

    @functools.wraps(hook)
    def guarded(self: Callback, config: DictConfig, **options: Any) -> None:
        try:
            hook(self, config, **options)
        except Exception as error:
            sys.exit(f"{config.hydra.job.name}.py: {describe(error)}")

    return guarded


class SweepCallback(Callback):
    """Hydra's callback that keeps the record of a sweep, whichever launcher runs its jobs."""

    sweep: Sweep | None = None  # of this process, while it is launching one
    launched_from: int | None = None  # the process

    @_final
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        verb, hydra_overrides = config.hydra.job.name, config.hydra.overrides.hydra
        overrides = [
            override
            for override in config.hydra.overrides.task
            if not override.lstrip("+~").startswith(WITHOUT_EFFECT)
        ]
        try:
            refuse_secrets({"the command line": list(config.hydra.overrides.task)})
        except ValueError as error:  # before Hydra writes multirun.yaml
            sys.exit(f"{verb}.py: {error}")
        given = _is_given("hydra.sweep.dir", config.hydra)
        folder, resume = None, bool(OmegaConf.select(config, "resume"))
        if resume and not given:
            folder = find_sweep(OUTPUTS / verb, verb, overrides)
        folder = (folder or Path(config.hydra.sweep.dir)).absolute()
        # Jobs compose their configuration anew, perhaps in another working folder. `++` is our
        # own: `_is_given` still tells what the user said.
        escaped = str(folder).replace("'", "\\'")
        hydra_overrides.append(f"{'' if given else '++'}hydra.sweep.dir='{escaped}'")
        config.hydra.sweep.dir = str(folder)
        SweepCallback.sweep = Sweep(folder, verb, overrides, _num_jobs(config), resume)
        self.launched_from = os.getpid()

    @_final
    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        # A job may be in another process. Those of joblib would go on alone after a kill -9.
        is_joblib = config.hydra.launcher._target_.endswith(".JoblibLauncher")
        if is_joblib and self.launched_from not in (None, os.getpid()):
            end_with(parent=self.launched_from)

    @_final
    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if not self.finish():
            sys.exit(1)

    @classmethod
    def finish(cls, error: str | None = None) -> bool:
        """Print what became of the sweep, and how to get what is missing; whether all is done."""
        assert cls.sweep is not None
        all_done = cls.sweep.finish(error)
        if not all_done and cls.sweep.jobs:
            command = _resume_command("hydra.sweep.dir", cls.sweep.folder)
            say(f"\nfor what is missing:\n  {command}")
        return all_done


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration, in plain types alone. ValueError: a value is missing."""
    try:
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{reason}; give it on the command line") from error
    assert isinstance(config, dict)
    refuse_secrets(config)
    for key, (kind, least) in NUMBERS.items():
        value = OmegaConf.select(cfg, key)
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        if value is not None and (not number or value < least):
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{key}={value}: give {what}, {least} or more")
    return config  # type: ignore[return-value]


def fresh_folder(name: str) -> str:
    """Make a folder of this name that did not exist before; `name_2` and so on where it did."""
    number = 1
    while True:
        folder = Path(name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return str(folder)


# All here, so that they are known to every process that unpickles the callback.
OmegaConf.register_new_resolver("fresh_folder", fresh_folder, use_cache=True, replace=True)
warnings.filterwarnings(  # conf/hydra/launcher names what its plugins name, on purpose
    "ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema"
)


def _folder_to_resume(key: str) -> Path:
    """The folder that a resumed job runs in: of the newest run with this hash, or Hydra's own.

    A `hydra.run.dir` or `hydra.sweep.dir` on the command line is taken at its word: nothing outside
    of it is looked at.
    """
    hydra_config = HydraConfig.get()
    own = Path(hydra_config.runtime.output_dir)
    status = read_status(own)
    if status is not None and is_same(status.get("config_hash", key), key):
        return own
    if hydra_config.mode == RunMode.RUN:
        found = None if _is_given("hydra.run.dir", hydra_config) else find_run(OUTPUTS, key)
        if found is not None:
            own.rmdir()
        return found or own
    if status is not None:  # another job's; the sweep has changed
        own = Path(fresh_folder(str(own)))
    found = find_run(Path(hydra_config.sweep.dir), key)
    if found is not None:
        own.rmdir()
    elif not _is_given("hydra.sweep.dir", hydra_config):
        found = find_run(OUTPUTS, key)
        if found is not None:
            write_json(own / ELSEWHERE, {"folder": str(found.absolute())})
    return found or own


def _log_into(folder: Path) -> None:
    """Have Hydra's log file in this folder from now on."""
    config: Any = HydraConfig.instance().cfg
    if Path(config.hydra.runtime.output_dir) == folder:
        return
    with read_write(config.hydra):
        config.hydra.runtime.output_dir = str(folder)
        config.hydra.run.dir = str(folder)  # Lightning hands it to the processes it starts
    # A copy: Hydra's own refers to the configuration that this one was taken from, and in a sweep
    # it has resolved the name of the file.
    copy = OmegaConf.create({"hydra": OmegaConf.to_container(config.hydra)})
    file = OmegaConf.select(copy, "hydra.job_logging.handlers.file")
    if file is not None:
        file.filename = str(folder / f"{config.hydra.job.name}.log")
    configure_log(copy.hydra.job_logging, copy.hydra.verbose)


def _num_jobs(config: DictConfig) -> int | None:
    """How many jobs a multirun stands for, where Hydra's own sweeper makes them."""
    if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return None
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
    sizes = {}  # of several that set the same key, the last counts
    for override in overrides:
        try:
            values = override.sweep_string_iterator() if override.is_sweep_override() else [""]
            sizes[override.get_key_element()] = sum(1 for _ in values)
        except AssertionError:  # glob() needs to look the names up
            return None
    return math.prod(sizes.values())


def _is_given(key: str, hydra_config: Any) -> bool:
    return any(override.startswith(f"{key}=") for override in hydra_config.overrides.hydra)


def _resume_command(key: str, folder: Path) -> str:
    """The command line of this process, resuming what is in the folder."""
    arguments = [a for a in sys.argv[1:] if not a.startswith(("resume=", f"{key}="))]
    return shlex.join(["python", sys.argv[0], *arguments, "resume=true", f"{key}={folder}"])


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Between jobs SIGTERM is like Ctrl-C; within one the job sees to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _asks_only(arguments: list[str]) -> bool:
    return any(argument.startswith(("--cfg", "-c", "--info")) for argument in arguments)


def _one_line(error: Exception) -> str:
    """What Hydra says, and what OmegaConf said to it, without the list of where it looked."""
    text = str(error).partition("Config search path")[0]
    if error.__cause__ is not None:
        text += " " + str(error.__cause__).partition("\n")[0]
    return " ".join(text.split())


def _hint_for_sweep(error: Exception) -> str:
    """What helps where Hydra missed a key: it composes a sweep without the choices it sweeps."""
    key = re.match(r"Could not override '([^']+)'", str(error))
    if key is None:
        return ""
    return f"; if the choices that are swept have this key, write {key[1]}=choice(<value>)"


def _refused_folder(verb: str, arguments: list[str]) -> Path:
    """Where the refusal of a command line is recorded: the folder it asked for, or a new one."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("hydra.run.dir", "hydra.sweep.dir") and value:
            return Path(value)
    return Path(fresh_folder(f"outputs/{verb}/{datetime.now():%Y-%m-%d_%H-%M-%S}_refused"))
