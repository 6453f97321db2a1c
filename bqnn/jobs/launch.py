"""The command line. Only this module uses Hydra and OmegaConf; Jobs get plain dictionaries."""

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import configure_log
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from bqnn.files import write_json
from bqnn.jobs.job import Job, describe, end_with
from bqnn.jobs.locate import canonical
from bqnn.jobs.own import choose_own
from bqnn.jobs.ranks import find_place, hide_launcher
from bqnn.jobs.records import read_record
from bqnn.jobs.secrets import is_secret_name, mask, refuse_secrets
from bqnn.jobs.status import (
    ELSEWHERE,
    WITHOUT_EFFECT,
    config_hash,
    find_run,
    is_prolonged,
    is_same,
    read_status,
)
from bqnn.jobs.sweep import Sweep, find_sweep
from bqnn.jobs.terminal import protect_output, say, say_once
from bqnn.settings.conf import CONF, leaves
from bqnn.settings.options import LEFT_OUT, OPTIMIZER, RULES, check_options
from bqnn.settings.suggest import did_you_mean, nearest
from bqnn.text import one_line, valid_name

OUTPUTS = Path("outputs")


Check = Callable[[dict[str, Any], bool], None]  # configuration, whether it is a sweep


def launch(task: Callable[[Job], None], verb: str, check: Check | None = None) -> None:
    """Run a task once, or for every Job of a multirun, and exit.

    An invalid command line gives an error of one line and leaves no files. A failed Job prints one
    line and records it in its status.json. A multirun continues with the next Job, and ends with a
    table and sweep.json.

    Args:
        task: Called with each Job.
        verb: The name of the program. The configuration is conf/<verb>.yaml.
        check: Raises ValueError for an invalid configuration. It is called, before any file is
            written, with the configuration and whether it is a multirun.

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
    SweepCallback.sweep, SweepCallback.check = None, check

    def run(cfg: DictConfig) -> float | None:
        state = run_job(cfg, task, verb)
        states.append(state)
        # Return NaN instead of raising: Hydra would not launch the remaining Jobs.
        return None if state == "DONE" else float("nan")

    error: Exception | None = None
    with _sigterm_as_interrupt():
        try:
            refuse_secrets({"the command line": sys.argv[1:]}, references=False)
            _refuse_malformed(_arguments(), verb)
            if verb == "train":
                sys.argv[1:] = choose_own(sys.argv[1:])
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=verb)(run)()
        except _UsageError as usage:
            say(f"{verb}.py: {usage}", error=True)
            sys.exit(2)
        except _StoppedError as stop:
            error = stop.error
        except (KeyboardInterrupt, SystemExit) as stop:
            if isinstance(stop, SystemExit) and stop.code != 130:
                raise
            if SweepCallback.sweep is not None:
                SweepCallback.finish("interrupted")
            sys.exit(130)
        except Exception as raised:  # from Hydra or a launcher; a Job handles its own
            error = raised
        if error is not None:
            message = _explain(error, verb)
            if SweepCallback.sweep is not None:
                SweepCallback.finish(message)
            say(f"{verb}.py: {message}", error=True)
            sys.exit(1)
    if any(state != "DONE" for state in states):
        sys.exit(1)


def run_job(cfg: DictConfig, task: Callable[[Job], None], verb: str) -> str:
    """Run one Job in the folder that Hydra chose, or in the folder of the Run that it resumes.

    Args:
        cfg: The composed configuration.
        task: Called with the Job.
        verb: The name of the program.

    Returns:
        The state of the Job, one of `bqnn.jobs.status.STATES`.
    """
    protect_output()  # this may be a process of a launcher
    hydra_config = HydraConfig.get()
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    resume = bool(OmegaConf.select(cfg, "resume"))
    job = Job(Path(hydra_config.runtime.output_dir), verb)
    if is_sweep:
        job.sweep = Path(hydra_config.sweep.dir).name
    with job:
        try:
            config = checked(cfg)
        except (ValueError, OSError):
            if is_sweep:  # the table of the sweep lists this Job, too
                with contextlib.suppress(FileExistsError):
                    job.claim()
            raise
        if resume:
            job.folder = _folder_to_resume(config)
            _log_into(job.folder)
        if not is_sweep:
            job.resume_command = _resume_command("hydra.run.dir", job.folder)
        if job.take(config, resume):
            task(job)
        else:
            say(f"done before: {job.folder}")
    return job.state


class _UsageError(Exception):
    """The command line has unknown options, or options in the wrong order."""


class _StoppedError(SystemExit):
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
            raise _StoppedError(error) from error

    return guarded


class SweepCallback(Callback):
    """Refuse invalid configurations before any file is written, and record a sweep."""

    check: Check | None = None  # the `check` of `launch`
    sweep: Sweep | None = None  # the sweep that this process is launching
    launched_from: int | None = None  # the ID of the launching process

    @_final
    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        _refuse_composed(config)
        if not _is_given("hydra.run.dir", config.hydra):
            config.hydra.run.dir = fresh_folder(config.hydra.run.dir)

    @_final
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        verb, hydra_overrides = config.hydra.job.name, config.hydra.overrides.hydra
        overrides = [
            override
            for override in config.hydra.overrides.task
            if not override.lstrip("+~").startswith(WITHOUT_EFFECT)
        ]
        _refuse_folders(config)
        _refuse_hydra_secrets(config)
        jobs = _jobs(config)
        if jobs is not None:
            _refuse_invalid_sweep(config, jobs)
            _refuse_shared_folder(config, len(jobs))
        given = _is_given("hydra.sweep.dir", config.hydra)
        folder, resume = None, bool(OmegaConf.select(config, "resume"))
        if resume and not given:
            folder = find_sweep(OUTPUTS / verb, verb, overrides)
        if folder is None:
            name = config.hydra.sweep.dir
            folder = Path(name if given else fresh_folder(name))
        folder = folder.absolute()
        # Jobs compose their configuration again, possibly in another working directory. The prefix
        # `++` marks this override, so that `_is_given` reports only overrides of the user.
        escaped = str(folder).replace("'", "\\'")
        hydra_overrides.append(f"{'' if given else '++'}hydra.sweep.dir='{escaped}'")
        config.hydra.sweep.dir = str(folder)
        SweepCallback.sweep = Sweep(
            folder, verb, overrides, None if jobs is None else len(jobs), resume
        )
        self.launched_from = os.getpid()

    @_final
    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        # A Job may run in another process. Those of joblib would continue after a kill -9.
        is_joblib = config.hydra.launcher._target_.endswith(".JoblibLauncher")
        if is_joblib and self.launched_from not in (None, os.getpid()):
            end_with(parent=self.launched_from)

    @_final
    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if not self.finish():
            sys.exit(1)

    @classmethod
    def finish(cls, error: str | None = None) -> bool:
        """Print the results of the sweep and the command that completes it.

        Args:
            error: Why the sweep ended early, or None.

        Returns:
            Whether all Jobs are done.
        """
        assert cls.sweep is not None
        all_done = cls.sweep.finish(error)
        if not all_done and cls.sweep.jobs:
            command = _resume_command("hydra.sweep.dir", cls.sweep.folder)
            say(f"\nfor what is missing:\n  {command}")
        return all_done


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Resolve a configuration and convert it to plain types.

    Args:
        cfg: The composed configuration.

    Returns:
        Nested dictionaries and lists.

    Raises:
        ValueError: A value is missing, holds a secret, or is not allowed for its key.
    """
    try:
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{reason}; give it on the command line") from error
    assert isinstance(config, dict)
    refuse_secrets(config)
    check_options(config)  # type: ignore[arg-type]
    return config  # type: ignore[return-value]


def checked(cfg: DictConfig) -> dict[str, Any]:
    """Return `plain(cfg)` with canonical paths of checkpoints (see `bqnn.jobs.locate`).

    Args:
        cfg: The composed configuration.

    Returns:
        Nested dictionaries and lists.

    Raises:
        ValueError: See `plain`.
        FileNotFoundError: A checkpoint does not exist. A resumed Job may lack it.
    """
    config = plain(cfg)
    for key, node, name in (
        ("checkpoint", config, "checkpoint"),
        ("method.init_from", config.get("method", {}), "init_from"),
    ):
        if node.get(name) is not None:
            try:
                node[name] = canonical(key, node[name])
            except FileNotFoundError:
                if not config.get("resume"):
                    raise
    return config


def fresh_folder(name: str) -> str:
    """Create a new folder.

    Args:
        name: The path of the folder.

    Returns:
        The path, with the suffix `_2`, `_3` and so on if it exists.
    """
    number = 1
    while True:
        folder = Path(name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return str(folder)


# Registered at import, so that each process that unpickles the callback has them.
OmegaConf.register_new_resolver("valid_name", lambda text: valid_name(str(text)), replace=True)
OmegaConf.register_new_resolver(
    "class_name", lambda path: str(path).rpartition(".")[2], replace=True
)
warnings.filterwarnings(  # conf/hydra/launcher reuses the names of the plugins on purpose
    "ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema"
)


def _folder_to_resume(config: dict[str, Any]) -> Path:
    """Return the folder of the newest Run of a resumed Job, or the folder that Hydra chose.

    With `hydra.run.dir` or `hydra.sweep.dir` on the command line, only that folder is searched.
    """
    hydra_config, key = HydraConfig.get(), config_hash(config)
    own = Path(hydra_config.runtime.output_dir)
    status = read_status(own)
    if status is not None and is_same(status.get("config_hash", key), key):
        return own
    if status is not None and is_prolonged(own, config):
        return own
    if hydra_config.mode == RunMode.RUN:
        found = None if _is_given("hydra.run.dir", hydra_config) else find_run(OUTPUTS, key)
        if found is not None:
            own.rmdir()
        return found or own
    if status is not None:  # the folder of another Job: the sweep has changed
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
    """Move the log file of Hydra to this folder."""
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


def _jobs(config: DictConfig) -> list[list[str]] | None:
    """Return the overrides of each Job of a multirun, or None with a sweeper other than Basic."""
    if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return None
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=_loader())
    values: dict[str, list[str]] = {}  # the last override of a key wins
    for override in parser.parse_overrides([*params, *config.hydra.overrides.task]):
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:  # the sweeper will refuse it
            return None
    return [list(job) for job in itertools.product(*values.values())]


def _refuse_invalid_sweep(config: DictConfig, jobs: list[list[str]]) -> None:
    """Refuse a sweep if a choice cannot be composed or all Jobs are invalid.

    An invalid Job among valid ones fails on its own, like a Job that fails later.
    """

    def refusal(job: list[str]) -> Exception | None:
        composed = _loader().load_sweep_config(config, job)
        try:
            _refuse_composed(composed)
        except (ValueError, OSError) as error:
            return error
        return None

    # Only choices determine whether a Job can be composed: check one Job per set of choices.
    of_choices: dict[tuple[str, ...], int] = {}
    for number, job in enumerate(jobs):
        of_choices.setdefault(tuple(filter(_is_choice, job)), number)
    firsts = list(of_choices.values())
    refusals = [refusal(jobs[number]) for number in [*firsts, len(jobs) - 1]]
    if None in refusals:
        return
    if len(set(map(str, refusals))) > 1:  # equal refusals do not depend on the sweep
        rest = (job for number, job in enumerate(jobs[:-1]) if number not in firsts)
        if any(refusal(job) is None for job in rest):
            return
    assert refusals[0] is not None
    raise refusals[0]


def _refuse_composed(config: DictConfig) -> None:
    """Raise ValueError or FileNotFoundError if a configuration or its Hydra part is invalid."""
    _refuse_added_keys(config)
    _refuse_folders(config)
    _refuse_hydra_secrets(config)
    values = checked(OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"]))
    if SweepCallback.check is None:
        return
    # `check` imports Lightning, which would use unrelated variables of a cluster.
    alone = find_place(values.get("trainer", {})).launcher is None
    hidden = hide_launcher() if alone else {}
    try:
        SweepCallback.check(values, config.hydra.mode == RunMode.MULTIRUN)
    finally:
        os.environ.update(hidden)


def _refuse_folders(config: DictConfig) -> None:
    """Raise ValueError for an empty or invalid name of a folder or of the log file."""
    for key, name in (
        ("hydra.run.dir", config.hydra.run.dir),
        ("hydra.sweep.dir", config.hydra.sweep.dir),
    ):
        if not name.strip() or "\0" in name:
            raise ValueError(
                f"{key}={one_line(name)}: name a folder, or leave it out to get a new one below "
                f"{OUTPUTS}"
            )
    name = config.hydra.job.name
    if name != valid_name(name):
        raise ValueError(
            f"hydra.job.name={one_line(name)}: the log file is named so; choose a name of letters, "
            "digits, dots, dashes and underscores"
        )


def _refuse_shared_folder(config: DictConfig, num_jobs: int) -> None:
    """Raise ValueError if all Jobs of a sweep would share a folder."""
    name = str(_unresolved(config)["hydra"]["sweep"]["subdir"])
    if num_jobs > 1 and "${" not in name:
        raise ValueError(
            f"hydra.sweep.subdir={one_line(name)}: {num_jobs} jobs would share a folder; leave it "
            "out, or put ${hydra.job.num} in it"
        )


def _refuse_hydra_secrets(config: DictConfig) -> None:
    """Raise ValueError for a secret that Hydra would write to its files or folder names."""
    for name in config.hydra.job.env_set:
        if is_secret_name(name):
            raise ValueError(
                f"hydra.job.env_set.{name}: Hydra would write it to its files; set {name} in the "
                "environment, which every job gets"
            )
    unresolved: Any = OmegaConf.to_container(config, resolve=False)
    known = unresolved["hydra"]
    # Skip the paths of this machine, and the command line, which was checked before.
    del known["runtime"], known["overrides"], known["job"]["override_dirname"]
    refuse_secrets({"hydra": known})
    refuse_secrets({"hydra.run.dir": config.hydra.run.dir})


def _refuse_added_keys(config: DictConfig) -> None:
    """Raise ValueError for an unknown key added with `+`, or a required key removed with `~`."""
    overrides = [*config.hydra.overrides.hydra, *config.hydra.overrides.task]
    rest = [o for o in overrides if not o.startswith("~") and (o[:1] != "+" or _is_choice(o))]
    if rest == overrides:
        return
    verb = config.hydra.job.config_name
    original = _loader().load_configuration(verb, rest, run_mode=RunMode.RUN)
    before, now = (dict(leaves(_unresolved(c))) for c in (original, config))
    for key in sorted(now.keys() - before.keys()):
        _refuse_added_key(key, before, verb)
    for key in sorted(before.keys() - now.keys()):
        is_option = verb == "train" and key.split(".")[0] in ("method", "net", "task")
        if not is_option and not any(other.startswith(f"{key}.") for other in now):
            raise ValueError(f"~{key}: this key is needed; it can be changed, but not removed")


def _refuse_added_key(key: str, known: dict[str, Any], verb: str) -> None:
    group = key.partition(".")[0]
    if group in ("method", "net", "task") and verb == "train":
        return  # `check` compares them with the arguments of the classes
    if key.startswith(OPEN):
        return
    names = set(known)
    if group == "trainer" and "trainer.max_epochs" in known:
        names |= {option for option in (*RULES, *LEFT_OUT) if option.startswith("trainer.")}
    if verb == "quantize":
        names |= {f"quant.fine_tuning.optimizer.{option}" for option in OPTIMIZER}
    if key not in names and not any(key.startswith(f"{name}.") for name in known):
        raise ValueError(_unknown_key(key, names, verb))


# Parts of the Hydra configuration that accept any key.
OPEN = ("hydra.callbacks.", "hydra.hydra_logging.", "hydra.job_logging.")


def _unresolved(config: DictConfig) -> dict[str, Any]:
    """Return the unresolved configuration in plain types, without parts that vary per call."""
    values: Any = OmegaConf.to_container(config, resolve=False)
    for key in ("runtime", "overrides"):
        values["hydra"].pop(key, None)
    return dict(values)


def _loader() -> Any:
    return GlobalHydra.instance().config_loader()


def _is_choice(override: str) -> bool:
    """Return whether an override selects a file of a group rather than a value."""
    key = override.lstrip("+~").partition("=")[0].partition("@")[0]
    return bool(_loader().get_group_options(key))


def _is_given(key: str, hydra_config: Any) -> bool:
    return any(override.startswith(f"{key}=") for override in hydra_config.overrides.hydra)


def _resume_command(key: str, folder: Path) -> str:
    """Return the command line of this process with options to resume in a folder."""
    arguments = [a for a in sys.argv[1:] if not a.startswith(("resume=", f"{key}="))]
    given = f"{key}={folder}"
    try:
        is_plain = OverridesParser.create().parse_override(given).value() == str(folder)
    except HydraException:
        is_plain = False
    given = given if is_plain else _quoted(key, str(folder))
    return shlex.join(["python", sys.argv[0], *arguments, "resume=true", given])


def _quoted(key: str, value: str) -> str:
    escaped = value.replace('"', '\\"')
    return f'{key}="{escaped}"'


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C between Jobs; a Job handles it itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _arguments() -> argparse.Namespace:
    """Parse the command line with the parser of Hydra."""

    def refuse(message: str) -> NoReturn:
        _, options, rest = message.rpartition("unrecognized arguments: ")
        remedy = "--help and --hydra-help tell what there is"
        if options and not any(word.startswith("-") for word in rest.split()):
            remedy = "write options, such as -m, before all that has the form key=value"
        raise _UsageError(f"{one_line(mask(message))}; {remedy}")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args()


# The key of an override, of a value or of a group, with its prefix, as Hydra accepts it.
_KEY = re.compile(r"(\+\+?|~)?[\w$][\w$./@:-]*")


def _refuse_malformed(arguments: argparse.Namespace, verb: str) -> None:
    """Raise ValueError for arguments that Hydra would report unclearly, or not check."""
    if arguments.experimental_rerun is not None:
        raise ValueError(
            "--experimental-rerun: it would unpickle a file, which can run any code; write the "
            "overrides again, with resume=true to go on with a run"
        )
    if arguments.config_name is not None or arguments.config_path is not None:
        raise ValueError(
            f"--config-name, --config-path: {verb}.py reads conf/{verb}.yaml; leave them out, and "
            "add choices of your own with --config-dir"
        )
    for override in arguments.overrides:
        key, equals, value = override.partition("=")
        shown = one_line(mask(override)) or "''"
        if not _KEY.fullmatch(key) or not (equals or key.startswith("~")):
            raise ValueError(
                f"{shown}: write it as key=value, with a key of letters (python {verb}.py --cfg "
                "job shows all)"
            )
        if equals and not value and (choices := _choices(key)):
            raise ValueError(f"{shown}: choose one of {', '.join(choices)}")


def _choices(key: str) -> list[str]:
    """Return the sorted choices of the group in conf/ with this key."""
    return sorted(path.stem for path in (CONF / key.lstrip("+~")).glob("*.yaml"))


def _explain(error: Exception, verb: str) -> str:
    """Explain an error of the command line in one line, with a correction if there is one."""
    if isinstance(error, OverrideParseException):
        return _in_quotes(error.override) or one_line(mask(str(error)))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        near = nearest(choice, error.options)
        hint = "" if near is None else f"; did you mean {group}={near}?"
        there = f"there are {', '.join(error.options)}"
        return one_line(mask(f"Could not find '{group}/{choice}'{hint} ({there})"))
    text = str(error)
    if "defaults list" in text:  # the group exists; + adds it
        return one_line(mask(text))
    if match := re.match(r"Could not override '([^']+)'", text):
        hint = _hint_for_sweep(match[1]) if {"-m", "--multirun"} & set(sys.argv) else ""
        return one_line(mask(_unknown_key(match[1], _known_keys(verb), verb) + hint))
    if text.startswith(("Config group override must be a string", "Error resolving interpolation")):
        return _no_choice() or one_line(mask(text))
    if match := re.search(
        r"Missing mandatory value: (\S+)|Interpolation key '(\S+)' not found", text
    ):
        return f"{match[1] or match[2]} is missing; give it on the command line"
    if match := re.match(r"Ambiguous value for argument '(.*)'\n", text):
        return _in_quotes(match[1]) or one_line(mask(text))
    if not isinstance(error, HydraException):
        return describe(error)
    text = text.partition("Config search path")[0]  # omit the list of searched paths
    if error.__cause__ is not None:
        text += " " + str(error.__cause__).partition("\n")[0]
    return one_line(mask(text))


def _no_choice() -> str | None:
    """Return the correction of an override that removes a group or sets it to a non-choice."""
    for override in _arguments().overrides:
        group, equals, value = override.partition("=")
        choices = _choices(group)
        is_wrong = group[:1] == "~" or (equals and value not in choices and "," not in value)
        if choices and is_wrong:
            return one_line(mask(f"{override}: choose one of {', '.join(choices)}"))
    return None


def _in_quotes(override: str) -> str | None:
    """Return how to quote an override whose value has characters that are syntax in Hydra.

    It is None if quotes would not help.
    """
    key, _, value = override.partition("=")
    cure = _quoted(key, value.strip("'\""))
    try:
        OverridesParser.create().parse_override(cure)
    except HydraException:
        return None
    return (
        f"{one_line(mask(override))}: outside of quotes, = , ( ) [ ] {{ }} and others are Hydra's "
        f"own; write {one_line(mask(shlex.quote(cure)))}, or -m for a sweep over several values"
    )


def _unknown_key(key: str, known: Iterable[str], verb: str) -> str:
    """Report an unknown key, the most similar key, and the choices that have the key."""
    known = {key[:end] for key in known for end in [*_dots(key), None]}
    group, _, rest = key.partition(".")
    having = [
        path.stem
        for path in sorted(CONF.glob("*/*.yaml"))
        if path.parent.name == group and rest in dict(leaves(read_record(path)))
    ]
    hint = did_you_mean(key, known)
    if rest and having:
        hint = f"; {' and '.join(f'{group}={choice}' for choice in having)} would have it"
    part = "hydra" if group == "hydra" else "job"
    return f"{key}: there is no such key{hint} (python {verb}.py --cfg {part} shows all)"


def _dots(key: str) -> Iterator[int]:
    return (end for end, character in enumerate(key) if character == ".")


def _known_keys(verb: str) -> list[str]:
    """Return the configuration keys for the choices on the command line, ignoring its values."""
    arguments = _arguments()
    folder = arguments.config_dir
    own = [] if folder is None else [f"hydra.searchpath=[{json.dumps(f'file://{folder}')}]"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        choices = [o for o in arguments.overrides if _is_choice(o) and "," not in o]
        try:
            composed = compose(verb, [*own, *choices], return_hydra_config=True)
            return [key for key, _ in leaves(_unresolved(composed))]
        except HydraException:
            return []


def _hint_for_sweep(key: str) -> str:
    """Return a hint for a missing key: Hydra composes a sweep without the swept choices."""
    return f"; if the choices that are swept have this key, write {key}=choice(<value>)"
