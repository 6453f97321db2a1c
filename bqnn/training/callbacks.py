"""Lightning callbacks of a training: checkpoints, times, schedules, ranks."""

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

log = logging.getLogger(__name__)


class SaveCheckpoint(Checkpoint):
    """Saves checkpoint.ckpt, and best.ckpt on request.

    It saves only at the ends of epochs, after validation: at least `save_every` seconds apart, and
    at the last epoch, however the training ends. best.ckpt is the validated epoch with the lowest
    val/nll.

    Args:
        folder: Where both files are written.
        save_every: Seconds.
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
        # The best first: what a checkpoint knows of the best has to include its own epoch.
        if self.save_best and self._was_validated:
            self._was_validated = False
            nll = float(trainer.callback_metrics["val/nll"])
            if nll < self.best_nll:
                self.best_nll = nll
                self._save(trainer, self.best_path)
        is_due = time.monotonic() - self._saved_at >= self.save_every
        # Clocks differ, and all must save.
        if trainer.strategy.broadcast(is_due or is_last_epoch(trainer)):
            self._save(trainer, self.path)
            self._saved_at = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._was_validated = True

    def state_dict(self) -> dict[str, float]:
        return {"best_nll": self.best_nll}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        if self.best_path.exists():  # else the next one is the best that there is
            self.best_nll = state_dict["best_nll"]

    def _save(self, trainer: pl.Trainer, path: Path) -> None:
        if not trainer.is_global_zero:
            trainer.save_checkpoint(path, weights_only=False)  # waits for the first, writes nothing
            return
        with written_beside(path) as beside:
            trainer.save_checkpoint(beside, weights_only=False)


def save_checkpoint(trainer: pl.Trainer, model: pl.LightningModule, path: Path) -> None:
    """Save a model that no fit has trained, in the same format."""
    trainer.strategy.connect(model)
    with written_beside(path) as beside:
        trainer.save_checkpoint(beside, weights_only=True)


class EpochTimer(pl.Callback):
    """Measures the seconds to the first training step, and those of each training epoch."""

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
        """Seconds to the first step and of an epoch (the median); nothing if no step was made."""
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
    """Copies the statistics of batch norm from the first rank to the others before their use.

    Each rank learns them from its own rows, as is usual in distributed training.
    """

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                dist.broadcast(buffer, 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)


class PlanAnew(pl.Callback):
    """Stretches the cosine schedule of a resumed training that was given more epochs.

    The schedule in its checkpoint would fall to a learning rate of 0 and then rise again. The rate
    continues where a schedule of the new length would be. A training whose length is the same does
    not change.
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
                "the learning rate was planned for %d %s and now is for %d, from where that plan "
                "would be: the result is not that of a training which had them from the start",
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
