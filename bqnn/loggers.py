"""Where metrics, configuration and pictures go while a job runs."""

import csv
import io
import netrc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

from bqnn.data import TensorData
from bqnn.data.images import ImageData
from bqnn.files import append_text, written_beside
from bqnn.methods import Method
from bqnn.results import Predictions
from bqnn.run import Job

if TYPE_CHECKING:
    import numpy as np
    import wandb
    from torch import Tensor

NUM_UNCERTAIN = 50  # images in the table of the most uncertain ones
LEAST_SIDE = 64  # pixels of an image there, so that small ones can be seen


class MetricsCsv(Checkpoint):
    """Writes metrics.csv: one header, one row per logged epoch, on disk as soon as it is known.

    The rows are part of every checkpoint, so that a resumed run has those of the epochs that it
    goes on from. Being a Checkpoint, it is called when the epoch's metrics are complete; it has to
    come before the callback that saves.
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
    """The logger that the configuration names, if it names one; it is closed with the job."""
    loggers: list[Logger] = []
    if job.rank > 0:
        return loggers
    kind = job.config["logger"]["name"]
    if kind == "wandb":
        loggers.append(_wandb_logger(job))
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
    """Log what is known at the end of a job, outside of any epoch."""
    for logger in loggers:
        logger.log_metrics(dict(metrics))
        logger.save()  # Lightning's CSVLogger would wait for more


def log_pictures(loggers: list[Logger], paths: list[Path]) -> None:
    """Show pictures in Weights & Biases, under their file names."""
    for logger in _wandb_loggers(loggers):
        for path in paths:
            logger.log_image(f"plots/{path.stem}", [str(path)])


def log_layers(loggers: list[Logger], rows: list[dict[str, Any]]) -> None:
    """Show the rows of quantization.csv as a table in Weights & Biases."""
    for logger in _wandb_loggers(loggers):
        logger.log_table("quantization", list(rows[0]), [list(row.values()) for row in rows])


def log_uncertain(
    loggers: list[Logger], model: Method, data: TensorData, predictions: Predictions
) -> None:
    """Show the test images of highest predictive entropy as a table in Weights & Biases."""
    if not isinstance(data, ImageData):
        return
    for logger in _wandb_loggers(loggers):
        import wandb

        summary = model.likelihood.summary(predictions.samples)
        confidences, classes = summary["probabilities"].max(-1)
        entropy, names = summary["entropy"], data.class_names
        rows = [
            [
                wandb.Image(_pixels(data.test.inputs[row], data.white)),
                names[predictions.targets[row]],
                names[classes[row]],
                entropy[row].item(),
                summary["mutual_information"][row].item(),
                confidences[row].item(),
            ]
            for row in entropy.topk(min(NUM_UNCERTAIN, len(entropy))).indices.tolist()
        ]
        columns = ["picture", "truth", "prediction", "entropy", "mutual_information", "confidence"]
        logger.log_table("most_uncertain", columns, rows)


def log_checkpoint(loggers: list[Logger], job: Job) -> None:
    """Keep the job's checkpoint as an artifact, where `logger.artifacts` asks for it."""
    for logger in _wandb_loggers(loggers):
        if job.config["logger"]["artifacts"]:
            path = job.folder / "checkpoint.ckpt"
            logger.experiment.log_artifact(_artifact(job, _bits(job.config), path))


def _wandb_loggers(loggers: list[Logger]) -> Iterator[WandbLogger]:
    return (logger for logger in loggers if isinstance(logger, WandbLogger))


def _wandb_logger(job: Job) -> WandbLogger:
    import wandb

    config, options = job.config, job.config["logger"]
    quant = config["quant"]
    if job.verb == "evaluate":
        stage = "evaluate"
    else:
        stage = "float" if quant["name"] == "none" else quant["mode"]
    # A mode in the environment is the user's word; without a key a run online would ask for one.
    settings = wandb.Settings(silent=True, console="off")
    if "WANDB_MODE" not in os.environ:
        settings.mode = "online" if _has_wandb_key() else "offline"
    run = wandb.init(
        id=job.id,  # a resumed job goes on in its run
        resume="allow",
        name=_run_name(config, _bits(config)),
        project=options["project"],
        entity=options["entity"],
        group=options["group"] or job.sweep,
        job_type=stage,
        tags=[config["method"]["name"], config["task"]["name"], *options["tags"]],
        config=config,
        dir=job.folder,
        settings=settings,
    )
    run.define_metric("*", step_metric="epoch")
    # Without this, the next job of the process would go on in this job's run.
    job.at_end(lambda exit_code: wandb.finish(exit_code=exit_code))
    if options["artifacts"] and "checkpoint" in config:
        _use_checkpoint(run, job)
    return WandbLogger(experiment=run)


def _use_checkpoint(run: "wandb.Run", job: Job) -> None:
    """Declare the checkpoint that the job starts from as its input, which makes the lineage.

    Equal files of one name are one version of an artifact: the one that its training logged.
    """
    bits = "float" if job.verb == "quantize" else _bits(job.config)
    artifact = _artifact(job, bits, Path(job.config["checkpoint"]))
    if run.offline:
        # use_artifact refuses, because it would wait for the server. This is the record that it
        # writes; the server gets it with the rest of the run, when that is synced.
        run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def _artifact(job: Job, bits: str, path: Path) -> "wandb.Artifact":
    import wandb

    artifact = wandb.Artifact(_run_name(job.config, bits), type="model")
    artifact.add_file(str(path), name="checkpoint.ckpt", policy="immutable")  # not copied
    return artifact


def _run_name(config: Mapping[str, Any], bits: str) -> str:
    return f"{config['method']['name']}-{config['task']['name']}-{bits}-s{config['seed']}"


def _bits(config: Mapping[str, Any]) -> str:
    quant = config["quant"]
    if quant["name"] == "none":
        return "float"
    return f"w{quant['weight_bits']}a{quant['activation_bits']}"


def _pixels(image: "Tensor", white: int) -> "np.ndarray":
    """A picture [C, H, W] as uint8 [H, W, C], every pixel repeated where it is very small."""
    times = max(1, LEAST_SIDE // max(image.shape[1:]))
    scaled = (image.float() * (255 / white)).round().byte().permute(1, 2, 0)
    return scaled.repeat_interleave(times, 0).repeat_interleave(times, 1).numpy()


def _has_wandb_key() -> bool:
    """Whether a key is at hand; without one wandb would stop and ask."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
