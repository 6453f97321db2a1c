"""Set up the Lightning Trainer of a job, and fit with it."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from inspect import signature
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
from bqnn.inference.likelihoods import NotFiniteError
from bqnn.jobs.job import Job
from bqnn.methods import BayesByBackprop, Method
from bqnn.quant.spec import QuantSpec
from bqnn.text import short
from bqnn.training.batch_norm import refuse_single_values
from bqnn.training.callbacks import PlanAnew, SaveCheckpoint, ShareBuffers
from bqnn.training.loggers import MetricsCsv
from bqnn.training.process import prepare_torch
from bqnn.training.progress import TrainingProgress

# How Lightning learns its rank from what started the processes of a job (bqnn/jobs/ranks.py). It
# would choose by the environment alone, also for a job of one process.
ENVIRONMENTS = {
    "torchrun": TorchElasticEnvironment,
    "srun": SLURMEnvironment,
    "jsrun": LSFEnvironment,
    "parent": LightningEnvironment,
    None: LightningEnvironment,
}


def make_trainer(
    job: Job, loggers: list[Logger], callbacks: list[pl.Callback], validate: bool
) -> pl.Trainer:
    """The Trainer that the group `trainer` of the configuration describes.

    Args:
        job: The job, to whose folder it saves.
        loggers: As `make_loggers` returns them.
        callbacks: Callbacks that come before those that log and save.
        validate: Whether there are validation rows.
    """
    options = {**job.config["trainer"], "accelerator": prepare_torch(job)}
    refuse_options(options)
    if options["save_best"] and not validate:
        raise ValueError(
            "trainer.save_best=true: there are no validation rows to choose by; set "
            "task.validation_share above 0"
        )
    del options["threads"]
    save = SaveCheckpoint(job.folder, options.pop("save_every"), options.pop("save_best"))
    progress: list[pl.Callback] = [TrainingProgress()] if options.pop("progress_bar") else []
    trainer = pl.Trainer(
        **options,
        callbacks=[
            PlanAnew(),
            ShareBuffers(),
            *callbacks,
            MetricsCsv(job.folder / "metrics.csv"),
            save,
            *progress,
        ],
        logger=loggers,
        plugins=[ENVIRONMENTS[job.launcher]()],
        log_every_n_steps=0,  # metrics are logged once an epoch
        enable_progress_bar=False,  # ours is a callback of its own
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if validate else 0,
        inference_mode=False,
        use_distributed_sampler=False,
        default_root_dir=job.folder,
    )
    if trainer.world_size > 1:
        _prepare_ranks(job)
    return trainer


# Options under which a job could not write all of its results, and what to write instead.
_REFUSED = {
    "fast_dev_run": "trainer=smoke is a short run",
    "barebones": "logger=none plots=false leaves out what can be left out",
    "overfit_batches": "trainer.limit_train_batches trains on fewer batches",
    "limit_val_batches": "the validation rows are one batch; trainer.check_val_every_n_epoch says "
    "how often they are used, and task.validation_share=0 that they are not",
    "limit_test_batches": "the test rows are one batch, and are always used",
    "enable_checkpointing": "checkpoint.ckpt is always written",
}


def refuse_options(options: Mapping[str, Any]) -> None:
    """Raise a ValueError for options under which a job could not write all of its results."""
    for name, instead in _REFUSED.items():
        if name in options:
            raise ValueError(f"trainer.{name}={short(options[name])}: leave it out; {instead}")
    every, epochs = options["check_val_every_n_epoch"], options["max_epochs"]
    if options["save_best"] and None not in (every, epochs) and every > epochs:
        raise ValueError(
            f"trainer.save_best=true: no epoch would be validated to choose by, since "
            f"trainer.check_val_every_n_epoch={every} and trainer.max_epochs={epochs}; lower the "
            "first"
        )


def _prepare_ranks(job: Job) -> None:
    """Refuse several processes where one is needed, and clean up after them at the job's end."""
    if job.verb != "train" or job.sweep is not None:
        raise ValueError(
            f"trainer.devices={job.config['trainer']['devices']}: several devices train one model "
            "in a single run of train.py; leave trainer=ddp away from quantize.py and from sweeps"
        )

    def forget(_: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        for key in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(key, None)

    job.at_end(forget)


def fit(job: Job, trainer: pl.Trainer, model: Method, data: TensorData) -> None:
    """Train to the end.

    A job that is resumed goes on from the last checkpoint in its folder. A new training starts at
    the checkpoint of `method.init_from`, where there is one. What is measured afterwards is not
    logged by the trainer: it is for `log_final`, beside the curves.

    Raises:
        ValueError: No step could be made, batch norm would fail on the last batch, or an option
            does not suit the method. Errors name the configuration's keys.
    """
    path = job.folder / "checkpoint.ckpt"
    resumes = job.is_resumed and path.exists()
    if job.is_resumed:
        job.record_epoch(trained_epochs(path) if resumes else 0)
    refuse_single_values(trainer, model, data)
    with renamed(partial(_key, job.verb)):
        start = job.config["method"].get("init_from")
        if start is not None and job.verb == "train" and not resumes:
            assert isinstance(model, BayesByBackprop)
            start_from(model, start)
        trainer.fit(model, datamodule=data, ckpt_path=path if resumes else None, weights_only=True)
    if trainer.global_step == 0:
        limits = ("limit_train_batches", "max_steps", "max_time")
        given = {name: job.config["trainer"].get(name) for name in limits}
        said = ", ".join(f"trainer.{name}={short(v)}" for name, v in given.items() if v is not None)
        raise ValueError(f"{said}: the training ended before its first step; raise that limit")
    trainer.loggers = []


def _key(verb: str, name: str) -> str:
    """The key in the configuration of an argument that an error names.

    The argument is one of the Trainer, of `QuantSpec` or of the method.
    """
    if name in signature(pl.Trainer).parameters:
        return f"trainer.{name}"
    if name in {field.name for field in fields(QuantSpec)}:
        return f"quant.{name}"
    if verb == "quantize" and name.startswith("optimizer."):
        return f"quant.fine_tuning.{name}"
    return f"method.{name}"


def measure(
    run: Callable[..., Sequence[Mapping[str, float]]], model: Method, data: TensorData
) -> dict[str, float]:
    """The metrics of `trainer.validate` or `trainer.test`, whether or not all are finite."""
    try:
        (metrics,) = run(model, datamodule=data, verbose=False)
    except NotFiniteError as error:
        return error.metrics
    return dict(metrics)
