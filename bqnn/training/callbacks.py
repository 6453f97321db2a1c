"""Lightning callbacks for checkpoints, times, buffers of ranks, and resumed schedules."""

import logging
import math
import statistics
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Checkpoint
from torch.optim.lr_scheduler import CosineAnnealingLR

from bqnn.files import written_beside
from bqnn.jobs.job import Job
from bqnn.methods.epochs import is_last_epoch
from bqnn.text import counted

log = logging.getLogger(__name__)


class SaveCheckpoint(Checkpoint):
    """Save checkpoint.ckpt at the ends of epochs, and best.ckpt on request.

    checkpoint.ckpt is saved after validation, at most once in `save_every` seconds, and always
    after the last epoch. best.ckpt has the validated epoch with the lowest val/nll.

    Args:
        folder: The folder of both files.
        save_every: The shortest time between two saves, in seconds.
        save_best: Whether to save best.ckpt.
    """

    def __init__(self, folder: Path, save_every: float, save_best: bool) -> None:
        self.path = folder / "checkpoint.ckpt"
        self.best_path = folder / "best.ckpt"
        self.save_every = save_every
        self.save_best = save_best
        self.best_nll = float("inf")
        self._was_validated = False
        self._saved_at = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Save best.ckpt first, so that the best val/nll in checkpoint.ckpt includes this epoch.
        if self.save_best and self._was_validated:
            self._was_validated = False
            nll = float(trainer.callback_metrics["val/nll"])
            if nll < self.best_nll:
                self.best_nll = nll
                self._save(trainer, self.best_path)
        is_due = time.monotonic() - self._saved_at >= self.save_every
        # The clocks of ranks differ, but all ranks must save at the same time.
        if trainer.strategy.broadcast(is_due or is_last_epoch(trainer)):
            self._save(trainer, self.path)
            self._saved_at = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._was_validated = True

    def state_dict(self) -> dict[str, float]:
        return {"best_nll": self.best_nll}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        if self.best_path.exists():  # otherwise the next validated epoch is the best one
            self.best_nll = state_dict["best_nll"]

    def _save(self, trainer: pl.Trainer, path: Path) -> None:
        if not trainer.is_global_zero:
            trainer.save_checkpoint(path, weights_only=False)  # waits for rank 0
            return
        with written_beside(path) as beside:
            trainer.save_checkpoint(beside, weights_only=False)


def save_checkpoint(trainer: pl.Trainer, model: pl.LightningModule, path: Path) -> None:
    """Save a model that `Trainer.fit` has not trained, in the format of `SaveCheckpoint`.

    Args:
        trainer: The Trainer.
        model: The model.
        path: The file, which is replaced atomically.
    """
    trainer.strategy.connect(model)
    with written_beside(path) as beside:
        trainer.save_checkpoint(beside, weights_only=True)


class EpochTimer(pl.Callback):
    """Measure the time to the first step, of each training epoch, and of the whole training.

    Args:
        job: The job, whose start is the start of the first time.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.startup: float | None = None
        self.epochs: list[float] = []
        self.training = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log.info("CPU threads: %d", torch.get_num_threads())
        self._started = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.training = time.perf_counter() - self._started

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.startup is None:
            self.startup = self.job.seconds()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append(time.perf_counter() - self._epoch_started)

    def metrics(self) -> dict[str, float]:
        """Return the times in seconds, or an empty dictionary if there was no training step.

        `time/startup_seconds` is the time to the first step, `time/epoch_seconds` the median time
        of an epoch, and `time/training_seconds` the time of all epochs of this process.
        """
        if self.startup is None:
            return {}
        return {
            "time/startup_seconds": self.startup,
            "time/epoch_seconds": statistics.median(self.epochs),
            "time/training_seconds": self.training,
        }

    def __str__(self) -> str:
        times = self.metrics()
        if not times:
            return "no training step"
        return (
            f"first step after {times['time/startup_seconds']:.1f} s, "
            f"{counted(len(self.epochs), 'epoch')} of {times['time/epoch_seconds']:.3g} s (median)"
        )


class ShareBuffers(pl.Callback):
    """Broadcast the buffers of rank 0, such as the statistics of batch norm, to all ranks.

    In training, each rank updates its buffers with its own rows. The callback makes them equal
    before each validation, and at the end of each epoch.
    """

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                dist.broadcast(buffer, 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)


class StretchSchedule(pl.Callback):
    """Stretch the cosine schedule of a training that is resumed with more epochs.

    The schedule of the checkpoint would reach a learning rate of 0 and then rise again. Instead,
    the learning rate continues as in a schedule of the new length. The callback changes nothing if
    the length is the same.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            schedule = config.scheduler
            by_step = config.interval == "step"
            length = trainer.estimated_stepping_batches if by_step else trainer.max_epochs
            if not isinstance(schedule, CosineAnnealingLR) or schedule.T_max == length:
                continue
            assert length is not None
            log.warning(
                "the learning rate schedule had %d %s and now has %d: the training continues in "
                "the longer schedule, so its result differs from that of a training which had this "
                "length from the start",
                schedule.T_max,
                "steps" if by_step else "epochs",
                length,
            )
            schedule.T_max = int(length)
            share = (1 + math.cos(math.pi * schedule.last_epoch / length)) / 2
            groups = schedule.optimizer.param_groups
            for group, rate in zip(groups, schedule.base_lrs, strict=True):
                group["lr"] = rate * share
            schedule._last_lr = [group["lr"] for group in groups]
