"""Log to metrics.csv, and to the logger of the configuration: Weights & Biases or CSV."""

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

NUM_UNCERTAIN = 50  # images in the table of the most uncertain test images
LEAST_SIDE = 64  # pixels per side of an image in that table; smaller images are enlarged


class MetricsCsv(Checkpoint):
    """Write metrics.csv: a header, and one row after each logged epoch.

    Checkpoints contain the rows, so a resumed training keeps the rows of earlier epochs. The class
    is a Checkpoint callback because Lightning calls these last, when the metrics of an epoch are
    complete. It must precede the callback that saves checkpoints.

    Args:
        path: The path of metrics.csv.
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
    """Create the logger of the configuration, which is closed at the end of the job.

    Args:
        job: The job. `logger.name` in its configuration is `wandb`, `csv` or `none`.

    Returns:
        A list with the logger. It is empty for `none`, and on all ranks but the first.

    Raises:
        ValueError: The name is unknown.
    """
    loggers: list[Logger] = []
    if job.rank > 0:
        return loggers
    kind = job.config["logger"]["name"]
    if kind == "wandb":
        loggers.append(start_history(job))
    elif kind == "csv":
        # CSVLogger deletes the files in an existing folder, so a resumed job gets a new one.
        starts = len(list(job.folder.glob("csv*/metrics.csv")))
        name = f"csv_{starts + 1}" if starts else "csv"
        loggers.append(CSVLogger(job.folder, name=name, version=""))
        loggers[-1].log_hyperparams(job.config)
    elif kind != "none":
        raise ValueError(f"logger.name={kind!r}: unknown; choose wandb, csv or none")
    return loggers


def log_final(loggers: list[Logger], metrics: Mapping[str, float]) -> None:
    """Log metrics of the whole job instead of an epoch."""
    for logger in loggers:
        logger.log_metrics(dict(metrics))
        logger.save()  # otherwise CSVLogger writes them with the next metrics


def log_figures(loggers: list[Logger], paths: list[Path]) -> None:
    """Log the PNG files of figures to Weights & Biases, under their file names."""
    for logger in _wandb_histories(loggers):
        logger.attempt(logger.log_figures, paths)


def log_layers(loggers: list[Logger], rows: list[dict[str, Any]]) -> None:
    """Log the rows of quantization.csv to Weights & Biases as a table."""
    for logger in _wandb_histories(loggers):
        cells = [list(row.values()) for row in rows]
        logger.attempt(logger.log_table, "quantization", list(rows[0]), cells)


def log_uncertain(loggers: list[Logger], data: TensorData, prediction: Prediction) -> None:
    """Log the test images with the highest predictive entropy to Weights & Biases as a table.

    Args:
        loggers: The loggers of the job.
        data: The data set. Nothing is logged if it has no images.
        prediction: The prediction of the test rows, with targets.
    """
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
        columns = ["image", "truth", "prediction", "entropy", "mutual_information", "confidence"]
        logger.attempt(logger.log_table, "most_uncertain", columns, rows)


def log_checkpoint(loggers: list[Logger], job: Job) -> None:
    """Log the checkpoint of the job as an artifact, if `logger.artifacts` is true."""
    for logger in _wandb_histories(loggers):
        if job.config["logger"]["artifacts"]:
            logger.attempt(logger.run.log_artifact, own_artifact(job))


def _wandb_histories(loggers: list[Logger]) -> Iterator[WandbHistory]:
    return (logger for logger in loggers if isinstance(logger, WandbHistory))


def _pixels(image: "Tensor", white: int) -> "np.ndarray":
    """Convert an image [C, H, W] to uint8 [H, W, C], and enlarge a small one by whole factors."""
    times = max(1, LEAST_SIDE // max(image.shape[1:]))
    scaled = (image.float() * (255 / white)).round().byte().permute(1, 2, 0)
    return scaled.repeat_interleave(times, 0).repeat_interleave(times, 1).numpy()
