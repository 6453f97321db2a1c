"""Loggers of a job: metrics.csv, and what goes to the logger that the configuration names."""

import csv
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import CSVLogger, Logger

from bqnn.data import TensorData
from bqnn.data.images import ImageData
from bqnn.files import append_text, written_beside
from bqnn.inference.predictions import Prediction
from bqnn.jobs.job import Job
from bqnn.methods import Method
from bqnn.training.wandb import WandbHistory, own_artifact, start_history

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

log = logging.getLogger(__name__)

NUM_UNCERTAIN = 50  # images in the table of the most uncertain ones
LEAST_SIDE = 64  # pixels of an image there, so that small ones can be seen


class MetricsCsv(Checkpoint):
    """Writes metrics.csv: a header, and one row per logged epoch as soon as it is complete.

    Checkpoints contain the rows, so that a resumed run keeps those of its earlier epochs.
    Lightning calls a Checkpoint callback when the metrics of an epoch are complete. This one has
    to stand before the callback that saves.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, float]] = []
        self._columns: list[str] = []
        self._was_validated = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._write()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._was_validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        validated, self._was_validated = self._was_validated, False
        if not pl_module.is_logged_epoch():
            return
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step - 1}
        for name, value in trainer.callback_metrics.items():
            if name.startswith("train/") or (validated and name.startswith("val/")):
                row[name] = float(value)
        self._rows.append(row)
        if not trainer.is_global_zero:
            return
        if row.keys() <= set(self._columns) and self.path.exists():
            line = io.StringIO(newline="")
            self._writer(line).writerow(row)
            append_text(self.path, line.getvalue())
        else:
            self._write()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = state_dict["rows"]

    def _write(self) -> None:
        names = sorted({name for row in self._rows for name in row} - {"epoch", "step"})
        self._columns = ["epoch", "step", *names]
        with written_beside(self.path) as beside, beside.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(self._rows)

    def _writer(self, file: TextIO) -> "csv.DictWriter[str]":
        return csv.DictWriter(file, self._columns, restval="")


def make_loggers(job: Job) -> list[Logger]:
    """The logger that the configuration names, or none. It is closed at the end of the job."""
    loggers: list[Logger] = []
    if job.rank > 0:
        return loggers
    kind = job.config["logger"]["name"]
    if kind == "wandb":
        loggers.append(start_history(job))
    elif kind == "csv":
        # It would empty the folder of an earlier start.
        starts = len(list(job.folder.glob("csv*/metrics.csv")))
        name = f"csv_{starts + 1}" if starts else "csv"
        loggers.append(CSVLogger(job.folder, name=name, version=""))
        loggers[-1].log_hyperparams(job.config)
    elif kind != "none":
        raise ValueError(f"logger.name={kind!r}: unknown; choose wandb, csv or none")
    return loggers


def log_final(loggers: list[Logger], metrics: Mapping[str, float]) -> None:
    """Log the metrics of a whole job, which belong to no epoch."""
    for logger in loggers:
        logger.log_metrics(dict(metrics))
        logger.save()  # Lightning's CSVLogger would wait for more


def log_pictures(loggers: list[Logger], paths: list[Path]) -> None:
    """Show pictures in Weights & Biases, under their file names."""
    for logger in _wandb_histories(loggers):
        logger.attempt(logger.show_pictures, paths)


def log_layers(loggers: list[Logger], rows: list[dict[str, Any]]) -> None:
    """Show the rows of quantization.csv as a table in Weights & Biases."""
    for logger in _wandb_histories(loggers):
        cells = [list(row.values()) for row in rows]
        logger.attempt(logger.show_table, "quantization", list(rows[0]), cells)


def log_uncertain(loggers: list[Logger], data: TensorData, prediction: Prediction) -> None:
    """Show the test images of highest predictive entropy as a table in Weights & Biases."""
    if not isinstance(data, ImageData):
        return
    for logger in _wandb_histories(loggers):
        summary, targets = prediction.summary, prediction.targets
        assert targets is not None
        confidences, classes = summary["probabilities"].max(-1)
        entropy, names = summary["entropy"], data.class_names
        rows = [
            [
                logger.image(_pixels(data.test.inputs[row], data.white)),
                names[targets[row]],
                names[classes[row]],
                entropy[row].item(),
                summary["mutual_information"][row].item(),
                confidences[row].item(),
            ]
            for row in entropy.topk(min(NUM_UNCERTAIN, len(entropy))).indices.tolist()
        ]
        columns = ["picture", "truth", "prediction", "entropy", "mutual_information", "confidence"]
        logger.attempt(logger.show_table, "most_uncertain", columns, rows)


def log_checkpoint(loggers: list[Logger], job: Job) -> None:
    """Keep the job's checkpoint as an artifact, where `logger.artifacts` asks for it."""
    for logger in _wandb_histories(loggers):
        if job.config["logger"]["artifacts"]:
            logger.attempt(logger.run.log_artifact, own_artifact(job))


def _wandb_histories(loggers: list[Logger]) -> Iterator[WandbHistory]:
    return (logger for logger in loggers if isinstance(logger, WandbHistory))


def _pixels(image: "Tensor", white: int) -> "np.ndarray":
    """An image [C, H, W] as uint8 [H, W, C], with its pixels repeated where it is very small."""
    times = max(1, LEAST_SIDE // max(image.shape[1:]))
    scaled = (image.float() * (255 / white)).round().byte().permute(1, 2, 0)
    return scaled.repeat_interleave(times, 0).repeat_interleave(times, 1).numpy()
