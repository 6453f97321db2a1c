"""The command line: Hydra in front, plain dictionaries behind; only here is OmegaConf known."""

import contextlib
import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bqnn.run import Job, record_refusal
from bqnn.secrets import refuse_secrets

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
    "quant.fine_tuning.calibration_batches": (int, 1),
    "quant.fine_tuning.prior_weight": (float, 0),
    "quant.fine_tuning.optimizer.lr": (float, 0),
}

CONF = Path(__file__).resolve().parents[1] / "conf"


def launch(task: Callable[[Job], None], verb: str) -> None:
    """Run `task(job)` once, or for every job of a multirun, and exit.

    `conf/<verb>.yaml` is the configuration. What fails says so in one line and in its
    status.json; a multirun goes on with the next job. The exit code is 0 when every job succeeded.
    """
    OmegaConf.register_new_resolver("fresh_folder", fresh_folder, use_cache=True, replace=True)
    # Hydra then hands its errors to us, and we say them in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    states = []

    def run(cfg: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        is_sweep = hydra_config.mode == RunMode.MULTIRUN
        sweep = Path(hydra_config.sweep.dir).name if is_sweep else None
        job = Job(Path(hydra_config.runtime.output_dir), verb, sweep)
        with job:
            job.claim()
            job.configure(plain(cfg))
            task(job)
        states.append(job.state)

    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=verb)(run)()
    except Exception as error:  # only Hydra's own can get here: a job keeps its errors to itself
        message = _one_line(error)
        asks_only = any(argument.startswith(("--cfg", "-c", "--info")) for argument in sys.argv[1:])
        if not asks_only:
            with contextlib.suppress(OSError):  # the folder may be what was wrong
                record_refusal(_refused_folder(verb, sys.argv[1:]), message)
        sys.exit(f"{verb}.py: {message}")
    if any(state != "DONE" for state in states):
        sys.exit(1)


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


def lr_at_bits(lr: float, weight_bits: object) -> float:
    """A learning rate for 8-bit weights, at fewer bits times the square root of their step.

    A weight has to cross half a step to become another integer. `QuantSpec` refuses bits that are
    none; until then they change nothing.
    """
    is_valid = type(weight_bits) is int and 2 <= weight_bits <= 8
    return lr * 2 ** ((8 - weight_bits) / 2) if is_valid else lr  # type: ignore[operator]


OmegaConf.register_new_resolver("lr_at_bits", lr_at_bits, replace=True)


def _one_line(error: Exception) -> str:
    """What Hydra says, and what OmegaConf said to it, without the list of where it looked."""
    text = str(error).partition("Config search path")[0]
    if error.__cause__ is not None:
        text += " " + str(error.__cause__).partition("\n")[0]
    return " ".join(text.split())


def _refused_folder(verb: str, arguments: list[str]) -> Path:
    """Where the refusal of a command line is recorded: the folder it asked for, or a new one."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("hydra.run.dir", "hydra.sweep.dir") and value:
            return Path(value)
    return Path(fresh_folder(f"outputs/{verb}/{datetime.now():%Y-%m-%d_%H-%M-%S}_refused"))
