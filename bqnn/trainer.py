"""The Lightning Trainer of a job."""

import ctypes
import logging
import os
import statistics
import sys
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import Logger

from bqnn.checkpoint import SaveCheckpoint, read_checkpoint
from bqnn.data import TensorData
from bqnn.loggers import MetricsCsv
from bqnn.methods import Method
from bqnn.run import Job

log = logging.getLogger(__name__)


class EpochTimer(pl.Callback):
    """Seconds until the first training step was done, and seconds of each training epoch."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.startup: float | None = None
        self.epochs: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log.info("CPU threads: %d", torch.get_num_threads())

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.startup is None:
            self.startup = self.job.seconds()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append(time.perf_counter() - self._epoch_started)

    def metrics(self) -> dict[str, float]:
        """What was measured, in seconds: until the first step, and per epoch (the median)."""
        if self.startup is None:  # nothing was trained
            return {}
        return {
            "time/startup_seconds": self.startup,
            "time/epoch_seconds": statistics.median(self.epochs),
        }

    def __str__(self) -> str:
        times = self.metrics()
        if not times:
            return "nothing was trained"
        return (
            f"first step after {times['time/startup_seconds']:.1f} s, "
            f"{len(self.epochs)} epochs of {times['time/epoch_seconds']:.3g} s (median)"
        )


class ShareBuffers(pl.Callback):
    """Gives all ranks the statistics of batch norm that the first one has, before they are used.

    Each learns them from its own rows, as is usual with distributed training.
    """

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                dist.broadcast(buffer, 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)


def make_trainer(
    job: Job, loggers: list[Logger], callbacks: list[pl.Callback], validate: bool
) -> pl.Trainer:
    """A Trainer as `trainer` of the configuration says, saving to the job's folder."""
    options = {**job.config["trainer"], "accelerator": prepare_torch(job)}
    if str(options["precision"]).startswith("16"):
        raise ValueError(
            f"trainer.precision={options['precision']}: variances underflow in 16-bit floats; "
            "choose 32-true or bf16-mixed"
        )
    if options["save_best"] and not validate:
        raise ValueError(
            "trainer.save_best=true: there are no validation rows to choose by; set "
            "task.validation_share above 0"
        )
    del options["threads"]
    save = SaveCheckpoint(job.folder, options.pop("save_every"), options.pop("save_best"))
    show_progress = options.pop("progress_bar") and sys.stdout.isatty()
    progress: list[pl.Callback] = [TQDMProgressBar()] if show_progress else []
    # Lightning's remarks on the hardware it found are in status.json already.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    trainer = pl.Trainer(
        **options,
        callbacks=[
            ShareBuffers(),
            *callbacks,
            *progress,
            MetricsCsv(job.folder / "metrics.csv"),
            save,
        ],
        logger=loggers,
        log_every_n_steps=0,  # metrics are logged once an epoch
        enable_progress_bar=show_progress,
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
    """Train to the end, from the last checkpoint in the job's folder where the job is resumed."""
    path = job.folder / "checkpoint.ckpt"
    resumes = job.is_resumed and path.exists()
    if job.is_resumed:
        job.record_epoch(read_checkpoint(path)["epoch"] + 1 if resumes else 0)
    if not resumes:
        model.initialize()
    trainer.fit(model, datamodule=data, ckpt_path=path if resumes else None, weights_only=True)


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
