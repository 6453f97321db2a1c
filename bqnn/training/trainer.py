"""The Lightning Trainer of a job."""

import ctypes
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    LSFEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch import Tensor, nn

from bqnn.checkpoints.file import trained_epochs
from bqnn.data import TensorData
from bqnn.jobs.job import Job
from bqnn.methods import Method
from bqnn.text import short
from bqnn.training.callbacks import PlanAnew, SaveCheckpoint, ShareBuffers
from bqnn.training.loggers import MetricsCsv
from bqnn.training.progress import TrainingProgress

log = logging.getLogger(__name__)

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
    """A Trainer as `trainer` of the configuration says, saving to the job's folder."""
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
    # Lightning's remarks on the hardware it found are in status.json already.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
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


# What a job could not keep its promises under, and what to write instead.
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
    """ValueError for options under which something that a job promises could not be there."""
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
    """Refuse what several processes cannot do, and forget at the end that there were some."""
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
    """Train to the end, from the last checkpoint in the job's folder where the job is resumed.

    ValueError: no step could be made, or batch norm would fail on the last batch.
    """
    path = job.folder / "checkpoint.ckpt"
    resumes = job.is_resumed and path.exists()
    if job.is_resumed:
        job.record_epoch(trained_epochs(path) if resumes else 0)
    _refuse_single_values(trainer, model, data)
    if not resumes:
        model.initialize()
    trainer.fit(model, datamodule=data, ckpt_path=path if resumes else None, weights_only=True)
    if trainer.global_step == 0:
        limits = ("limit_train_batches", "max_steps", "max_time")
        given = {name: job.config["trainer"].get(name) for name in limits}
        said = ", ".join(f"trainer.{name}={short(v)}" for name, v in given.items() if v is not None)
        raise ValueError(f"{said}: the training ended before its first step; raise that limit")


@contextmanager
def trained_conditions(trainer: pl.Trainer, model: Method) -> Iterator[None]:
    """Have a model predict as it was trained: on the same device and in the same precision.

    Args:
        trainer: The Trainer that has trained the model.
        model: The model, which stays in evaluation mode.
    """
    model.to(trainer.strategy.root_device).eval()
    with trainer.precision_plugin.forward_context():
        yield


def _refuse_single_values(trainer: pl.Trainer, model: Method, data: TensorData) -> None:
    """ValueError where batch norm would get one value per channel, whose variance is none.

    That is where a batch has one row, and a batch norm sees it without, or at one, position.
    """
    size, rows = data.batch_size, math.ceil(len(data.train) / trainer.world_size)
    limit = trainer.limit_train_batches
    num_batches = math.ceil(rows / size)
    used = min(limit, num_batches) if isinstance(limit, int) else int(limit * num_batches)
    is_last_used = used == num_batches
    if 1 not in (size, rows % size if is_last_used else size):
        return
    name = _single_valued(model, data)
    if name is None:
        return
    fitting = next((b for b in range(size + 1, rows + 1) if rows % b != 1), None)
    remedy = "train on more than one row" if rows == 1 else f"choose task.batch_size={fitting}"
    what = "every batch" if size == 1 else f"the last batch of {rows} training rows"
    raise ValueError(
        f"task.batch_size={size}: {what} has one row, of which the batch norm {name} sees one "
        f"value per channel and can take no variance; {remedy}, or another network"
    )


@torch.no_grad()
def _single_valued(model: Method, data: TensorData) -> str | None:
    """The first batch norm that one row reaches with one value per channel, if there is one."""
    found: list[str] = []

    def look(name: str, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            found.append(name)

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs))
        for name, module in model.net.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    was_training = model.training
    try:
        if hooks:
            with torch.random.fork_rng([]):  # in eval mode, where nothing is learned of the row
                model.eval()(data.normalize(data.train.inputs[:1]))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def prepare_torch(job: Job) -> str:
    """Set threads and memory up as a job wants them, and name the accelerator that it runs on."""
    options = job.config["trainer"]
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    silence_known_warnings()
    keep_freed_memory()
    stop_searching_for_gpus()
    accelerator: str = options["accelerator"]
    if accelerator == "auto":  # Lightning would take a device without float64
        return "cuda" if torch.cuda.is_available() else "cpu"
    return accelerator


def stop_searching_for_gpus() -> None:
    """Where there is no GPU, have torch's optimizers take that as known.

    They ask at every step. Lightning sets how: by loading NVIDIA's library, which is searched for
    in vain for longer than Adam takes on a small network. That is for processes that fork, and
    ours do not.
    """
    if not torch.cuda.is_available():
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


def keep_freed_memory() -> None:
    """Have the C library reuse the memory of a step in the next one.

    By default glibc returns large blocks to the system and gets them back page by page, which
    took an eighth of a Bayes-by-backprop step on LeNet. It costs nothing over the peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)


def silence_known_warnings() -> None:
    """The upstream deprecations that we knowingly depend on, and advice that we do not need."""
    warnings.filterwarnings(
        "ignore", message=r"It is recommended to use `self.log\(.*sync_dist=True"
    )  # every rank evaluates all rows, so that their metrics are equal
    warnings.filterwarnings(
        "ignore",
        message=r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6, torch 2.14
        category=FutureWarning,
    )
    warnings.filterwarnings(
        "ignore",
        message=r"torch.quantize_per_tensor, torch.quantize_per_channel and other quantized tensor "
        r"creation functions that produce tensors with dtype torch.quint8, torch.qint8, and "
        r"torch.qint32 are deprecated",  # torch 2.14; bqnn/quant/fbgemm.py says what it would take
        category=UserWarning,
    )
