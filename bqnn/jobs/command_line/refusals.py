"""Refuse a composed configuration before any file is written."""

import os
from collections.abc import Callable
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bqnn.jobs.command_line.configuration import is_choice, loader, located, unresolved
from bqnn.jobs.command_line.messages import unknown_key
from bqnn.jobs.folder import OUTPUTS
from bqnn.jobs.ranks import find_place, hide_launcher
from bqnn.jobs.secrets import is_secret_name, refuse_secrets
from bqnn.settings.conf import leaves
from bqnn.settings.options import LEFT_OUT, OPTIMIZER, RULES
from bqnn.text import counted, one_line, valid_name

# Raises ValueError for an invalid configuration. It gets the plain configuration, and whether it
# is that of a multirun.
Check = Callable[[dict[str, Any], bool], None]

# Parts of the Hydra configuration that accept any key.
OPEN = ("hydra.callbacks.", "hydra.hydra_logging.", "hydra.job_logging.")


def refuse_run(config: DictConfig, check: Check | None) -> None:
    """Refuse a configuration if it, its Hydra part or the names of its folders are invalid.

    Args:
        config: The composed configuration of a single Job, with its Hydra part.
        check: The check of the verb, or None.

    Raises:
        ValueError: The configuration is invalid.
        FileNotFoundError: A checkpoint does not exist.
    """
    _refuse_added_keys(config)
    _refuse_folders(config)
    _refuse_hydra_secrets(config)
    values = located(OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"]))
    if check is None:
        return
    # `check` imports Lightning, which would use unrelated variables of a cluster.
    alone = find_place(values.get("trainer", {})).launcher is None
    hidden = hide_launcher() if alone else {}
    try:
        check(values, config.hydra.mode == RunMode.MULTIRUN)
    finally:
        os.environ.update(hidden)


def refuse_sweep(config: DictConfig, jobs: list[list[str]] | None, check: Check | None) -> None:
    """Refuse a multirun if a choice cannot be composed, or if all its Jobs are invalid.

    An invalid Job among valid ones fails on its own, like a Job that fails later.

    Args:
        config: The composed configuration of the multirun, with its Hydra part.
        jobs: The overrides of each Job, or None if they are unknown.
        check: The check of the verb, or None.

    Raises:
        ValueError: The names of the folders or all Jobs are invalid.
        FileNotFoundError: No Job has its checkpoint.
    """
    _refuse_folders(config)
    _refuse_hydra_secrets(config)
    _refuse_objectives(config)
    if jobs is not None:
        _refuse_invalid_jobs(config, jobs, check)
        _refuse_shared_folder(config, len(jobs))


def _refuse_invalid_jobs(config: DictConfig, jobs: list[list[str]], check: Check | None) -> None:
    def refusal(job: list[str]) -> Exception | None:
        composed = loader().load_sweep_config(config, job)
        try:
            refuse_run(composed, check)
        except (ValueError, OSError) as error:
            return error
        return None

    # Only choices determine whether a Job can be composed: check one Job per set of choices.
    of_choices: dict[tuple[str, ...], int] = {}
    for number, job in enumerate(jobs):
        of_choices.setdefault(tuple(filter(is_choice, job)), number)
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
            f"hydra.job.name={one_line(name)}: it is the name of the log file; choose letters, "
            "digits, dots, dashes and underscores"
        )


def _refuse_shared_folder(config: DictConfig, num_jobs: int) -> None:
    """Raise ValueError if all Jobs of a sweep would share a folder."""
    name = str(unresolved(config)["hydra"]["sweep"]["subdir"])
    if num_jobs > 1 and "${" not in name:
        raise ValueError(
            f"hydra.sweep.subdir={one_line(name)}: {num_jobs} jobs would share a folder; leave it "
            "out, or put ${hydra.job.num} in it"
        )


def _refuse_objectives(config: DictConfig) -> None:
    """Raise ValueError if a sweeper that optimizes does not get one metric for each direction."""
    if "direction" not in config.hydra.sweeper:
        return
    directions, names = config.hydra.sweeper.direction, config.get("objective")
    wanted = 1 if isinstance(directions, str) else len(directions)
    if names is None or len(names) != wanted:
        shown = one_line(str(names))[:60]
        raise ValueError(
            f"objective={shown}: hydra.sweeper.direction names {counted(wanted, 'direction')}; "
            "name as many metrics, such as objective=[int8/val/nll,size/packed_bytes]"
        )


def _refuse_hydra_secrets(config: DictConfig) -> None:
    """Raise ValueError for a secret that Hydra would write to its files or folder names."""
    for name in config.hydra.job.env_set:
        if is_secret_name(name):
            raise ValueError(
                f"hydra.job.env_set.{name}: Hydra would write it to its files; set {name} in the "
                "environment, which every job gets"
            )
    values: Any = OmegaConf.to_container(config, resolve=False)
    known = values["hydra"]
    # Skip the paths of this machine, and the command line, which was checked before.
    del known["runtime"], known["overrides"], known["job"]["override_dirname"]
    refuse_secrets({"hydra": known})
    refuse_secrets({"hydra.run.dir": config.hydra.run.dir})


def _refuse_added_keys(config: DictConfig) -> None:
    """Raise ValueError for an unknown key added with `+`, or a required key removed with `~`."""
    overrides = [*config.hydra.overrides.hydra, *config.hydra.overrides.task]
    rest = [o for o in overrides if not o.startswith("~") and (o[:1] != "+" or is_choice(o))]
    if rest == overrides:
        return
    verb = config.hydra.job.config_name
    original = loader().load_configuration(verb, rest, run_mode=RunMode.RUN)
    before, now = (dict(leaves(unresolved(c))) for c in (original, config))
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
        raise ValueError(unknown_key(key, names, verb))
