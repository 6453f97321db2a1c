"""Show the progress of a training or an evaluation: a bar on a terminal, else log lines."""

import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from tqdm import tqdm

from bqnn.methods import Method
from bqnn.methods.epochs import is_last_epoch

log = logging.getLogger(__name__)

NUM_LINES = 20  # approximate number of log lines of a training
PATIENCE = 300  # the longest time between two log lines, in seconds
SHOWN = ("train/loss", "val/nll")  # metrics


class TrainingProgress(Checkpoint):
    """Show the training loss, val/nll and the remaining time.

    On a terminal, one bar shows the whole training. Elsewhere, about twenty lines are logged, or
    one every five minutes: for the first and the last logged epoch, and for some in between. The
    class is a Checkpoint callback because Lightning calls these last, when the metrics of an epoch
    are complete.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._values: dict[str, float] = {}  # the values that the bar shows
        self._line_at = -math.inf  # epoch of the last log line
        self._said_at = -math.inf  # time of the last log line

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started, self._first_epoch = time.monotonic(), trainer.current_epoch
        if not trainer.is_global_zero or not _is_terminal():
            return
        batches, epochs = int(trainer.num_training_batches), trainer.max_epochs
        self._bar = tqdm(
            total=None if epochs is None or epochs < 0 else epochs * batches,
            initial=trainer.current_epoch * batches,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            **_size(),
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None:
            text = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._bar.set_description_str(text, refresh=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        # Read the loss only when the bar is drawn, because reading it synchronizes the GPU.
        if self._bar is not None and self._bar.update():
            if isinstance(outputs, dict) and "loss" in outputs:
                self._values["train/loss"] = float(outputs["loss"])
            self._bar.set_postfix_str(_text(self._values), refresh=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        if self._bar is not None:
            self._values |= _metrics(trainer)
            self._bar.set_postfix_str(_text(self._values))
        elif trainer.is_global_zero and pl_module.is_logged_epoch():
            self._say(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _say(self, trainer: pl.Trainer) -> None:
        epoch, now, epochs = trainer.current_epoch + 1, time.monotonic(), trainer.max_epochs or 0
        is_due = epoch - self._line_at >= epochs / NUM_LINES or now - self._said_at >= PATIENCE
        is_last = is_last_epoch(trainer)
        if not (is_due or is_last):
            return
        self._line_at, self._said_at = epoch, now
        seconds = (now - self._started) / (epoch - self._first_epoch)
        left = 0 if is_last else seconds * max(epochs - epoch, 0)
        text = _text(_metrics(trainer))
        log.info("epoch %d/%d: %s, %.0f s left", epoch, epochs, text, left)


@contextmanager
def evaluation_progress(
    what: str, sets: Sequence[str], num_samples: int, is_shown: bool = True
) -> Iterator[Callable[[int, int], None] | None]:
    """Show the progress of an evaluation.

    Args:
        what: The name of the evaluated model, such as int8.
        sets: The names of the sets.
        num_samples: The number of draws for each set.
        is_shown: False shows nothing and yields None.

    Yields:
        The argument `progress` of `predictive_sets`: a function of the index of a set and the
        index of a draw.
    """
    if not is_shown:
        yield None
    elif _is_terminal():
        with tqdm(total=len(sets) * num_samples, leave=False, **_size()) as bar:

            def move(index: int, draw: int) -> None:
                text = f"{what}: {sets[index]}, draw {draw + 1}/{num_samples}"
                bar.set_description_str(text, refresh=False)
                bar.update()

            yield move
    else:
        names = ", ".join(sets) if len(sets) < 4 else f"{len(sets)} sets"
        log.info("evaluating %s: %s; draws: %d", what, names, num_samples)
        said_at = time.monotonic()

        def say(index: int, draw: int) -> None:
            nonlocal said_at
            if time.monotonic() - said_at >= PATIENCE:
                said_at = time.monotonic()
                log.info("evaluating %s: %s, draw %d/%d", what, sets[index], draw + 1, num_samples)

        yield say


def _metrics(trainer: pl.Trainer) -> dict[str, float]:
    metrics = trainer.callback_metrics
    return {name: float(metrics[name]) for name in SHOWN if name in metrics}


def _text(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)


def _size() -> dict[str, int]:
    """Return the size of the terminal; tqdm shows no bar if it cannot find the size itself."""
    size = shutil.get_terminal_size()
    return {"ncols": size.columns, "nrows": size.lines}


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
