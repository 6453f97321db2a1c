"""Create the Lightning Trainer of a job, and train a model with it."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    LSFEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from bqnn.arguments import renamed
from bqnn.checkpoints.file import trained_epochs
from bqnn.checkpoints.start import start_from
from bqnn.data import TensorData
from bqnn.jobs.job import Job
from bqnn.methods import CompileSteps, Method, PointwiseStart
from bqnn.quant.spec import QuantSpec
from bqnn.text import one_line, short
from bqnn.training.batch_norm import refuse_single_values
from bqnn.training.callbacks import SaveCheckpoint, ShareBuffers, StretchSchedule
from bqnn.training.hooks import NoProfiler, SkipIdleHooks, Trainer
from bqnn.training.loggers import MetricsCsv
from bqnn.training.process import find_accelerator, prepare_torch
from bqnn.training.progress import TrainingProgress

# The source of Lightning's rank for each launcher in bqnn/jobs/ranks.py. By default, Lightning uses
# environment variables, even for a job of one process.
ENVIRONMENTS = {
    "torchrun": TorchElasticEnvironment,
    "srun": SLURMEnvironment,
    "jsrun": LSFEnvironment,
    "parent": LightningEnvironment,
    None: LightningEnvironment,
}


def make_trainer(
    job: Job,
    loggers: list[Logger],
    callbacks: list[pl.Callback],
    validate: bool,
    folder: Path | None = None,
) -> pl.Trainer:
    """Create the Trainer of the group `trainer` in the configuration.

    Args:
        job: The job.
        loggers: The result of `make_loggers`.
        callbacks: Further callbacks, which precede those that log and save.
        validate: Whether there are validation rows.
        folder: The folder of checkpoints and metrics.csv; None for that of the job.

    Raises:
        ValueError: `trainer.save_best` needs validation rows, the accelerator does not exist, or
            several devices are requested for a job other than a single training.
    """
    folder = job.folder if folder is None else folder
    options = {**job.config["trainer"], "accelerator": prepare_torch(job)}
    if options["save_best"] and not validate:
        raise ValueError(
            "trainer.save_best=true: there are no validation rows to choose by; set "
            "task.validation_share above 0 and task.refit=false"
        )
    for name in ("threads", "matmul_precision", "data_on_device"):
        options.pop(name, None)
    compiles: list[pl.Callback] = [CompileSteps()] if options.pop("compile", False) else []
    save = SaveCheckpoint(folder, options.pop("save_every"), options.pop("save_best"))
    progress: list[pl.Callback] = [TrainingProgress()] if options.pop("progress_bar") else []
    options["profiler"] = options.get("profiler") or NoProfiler()
    trainer = Trainer(
        **options,
        callbacks=[
            SkipIdleHooks(),
            StretchSchedule(),
            ShareBuffers(),
            *compiles,
            *callbacks,
            MetricsCsv(folder / "metrics.csv"),
            save,
            *progress,
        ],
        logger=loggers,
        plugins=[ENVIRONMENTS[job.launcher]()],
        log_every_n_steps=0,  # metrics are logged once an epoch
        enable_progress_bar=False,  # TrainingProgress replaces it
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if validate else 0,
        inference_mode=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    if trainer.world_size > 1:
        _prepare_ranks(job)
    return trainer


# The options that depend on the machine. The rules in bqnn/settings/options.py check the others.
MACHINE_OPTIONS = ("accelerator", "devices", "num_nodes", "strategy", "precision")


def refuse_devices(options: Mapping[str, Any], allow_several: bool) -> None:
    """Refuse devices that this machine does not have.

    Args:
        options: The group `trainer` of a configuration.
        allow_several: Whether the job can use several devices.

    Raises:
        ValueError: A device does not exist, or there are several although `allow_several` is
            False.
    """
    given = {key: options[key] for key in MACHINE_OPTIONS if key in options}
    accelerator = find_accelerator(given["accelerator"])
    if "devices" not in given:
        return
    devices = given["devices"]
    if accelerator == "cpu" and devices != "auto" and not str(devices).isdecimal():
        raise ValueError(
            f"trainer.devices={devices}: CPUs have no device numbers; give the number of processes "
            "that train the model, such as trainer.devices=1"
        )
    shown = " ".join(f"trainer.{key}={value}" for key, value in given.items())
    try:
        with _quiet():
            found = pl.Trainer(
                **{**given, "accelerator": accelerator},
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                plugins=[LightningEnvironment()],
            )
    except Exception as error:  # Lightning raises many types
        reason = one_line(str(error)).rstrip(".")
        raise ValueError(
            f"{shown}: {reason}; choose trainer.devices=1 trainer.accelerator=auto, which uses "
            "what the machine has"
        ) from error
    if found.world_size > 1 and not allow_several:
        raise ValueError(_single(devices))


def _single(devices: object) -> str:
    return (
        f"trainer.devices={devices}: only a single training can use several devices; leave "
        "trainer=ddp out of quantizations, evaluations and sweeps"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings and log lines of a Trainer that does not train."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _prepare_ranks(job: Job) -> None:
    """Refuse several processes unless the job is a single training, and clean up at its end."""
    if job.verb != "train" or job.sweep is not None:
        raise ValueError(_single(job.config["trainer"]["devices"]))

    def forget(_: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        for key in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(key, None)

    job.at_end(forget)


def fit(
    job: Job, trainer: pl.Trainer, model: Method, data: TensorData, folder: Path | None = None
) -> None:
    """Train a model to the end.

    A resumed job continues from the last checkpoint in the folder. A new training starts from the
    checkpoint `method.init_from`, if there is one.

    Args:
        job: The job.
        trainer: The result of `make_trainer`.
        model: The model.
        data: The data set, after `setup`.
        folder: The folder that `make_trainer` received; None for that of the job.

    Raises:
        ValueError: The training ended before its first step, batch norm would fail on a batch, or
            the method does not support an option. Errors name the keys of the configuration.
    """
    path = (job.folder if folder is None else folder) / "checkpoint.ckpt"
    data.on_device = job.config["trainer"].get("data_on_device", True)
    resumes = job.is_resumed and path.exists()
    if job.is_resumed and folder is None:
        job.record_epoch(trained_epochs(path) if resumes else 0)
    refuse_single_values(trainer, model, data)
    with renamed(partial(_key, job.verb)):
        start = job.config["method"].get("init_from")
        if start is not None and job.verb == "train":
            assert isinstance(model, PointwiseStart)
            if not resumes:
                start_from(model, start)
            if not model.trains_after_start:  # it needs one pass over the rows
                trainer.fit_loop.max_epochs = 1
        trainer.fit(model, datamodule=data, ckpt_path=path if resumes else None, weights_only=True)
    if trainer.global_step == 0:
        limits = ("limit_train_batches", "max_steps", "max_time")
        given = {name: job.config["trainer"].get(name) for name in limits}
        said = ", ".join(f"trainer.{name}={short(v)}" for name, v in given.items() if v is not None)
        raise ValueError(f"{said}: the training ended before its first step; raise that limit")


@contextlib.contextmanager
def trained_conditions(trainer: pl.Trainer, model: Method) -> Iterator[None]:
    """Run the body on the device and in the precision of the training, to predict as in training.

    Args:
        trainer: The Trainer that has trained the model.
        model: The model. It is set to evaluation mode, and stays in it.
    """
    model.to(trainer.strategy.root_device).eval()
    with trainer.precision_plugin.forward_context():
        yield


def _key(verb: str, name: str) -> str:
    """Return the key in the configuration of an argument of the Trainer, `QuantSpec` or method."""
    if name in signature(pl.Trainer).parameters:
        return f"trainer.{name}"
    if name in {field.name for field in fields(QuantSpec)}:
        return f"quant.{name}"
    if verb == "quantize" and (name == "imitate" or name.startswith("optimizer.")):
        return f"quant.fine_tuning.{name}"
    return f"method.{name}"
