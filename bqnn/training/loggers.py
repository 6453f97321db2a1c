"""Where metrics, configuration and pictures go while a job runs."""

import csv
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
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
from bqnn.text import LONGEST_NAME, one_line, valid_name
from bqnn.training.wandb import end_service, start_run

if TYPE_CHECKING:
    import numpy as np
    import wandb
    from torch import Tensor

log = logging.getLogger(__name__)

LONGEST_TAG = 64  # what Weights & Biases takes
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


class WandbHistory(Logger):
    """Shows what changes over epochs as curves in Weights & Biases, and all else in the summary.

    A metric has no curve before it changes; then it gets the points that it had. What fails on
    the way to W&B costs the job nothing: the log says so, once.

    run: the run that it writes to.
    """

    def __init__(self, run: "wandb.Run") -> None:
        super().__init__()
        self.run = run
        self._first: dict[str, tuple[float, float]] = {}  # epoch and value, while it is constant
        self._last_epoch: dict[str, float] = {}
        self._has_curve: set[str] = set()
        self._is_lost = False

    @property
    def name(self) -> str:
        return self.run.project

    @property
    def version(self) -> str:
        return self.run.id

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the run has had the whole configuration since it was started."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of the `epoch` that is one of them, or of the whole job where none is."""
        values = dict(metrics)
        epoch = values.pop("epoch", None)
        if epoch is None:
            self.attempt(self.run.summary.update, values)
            return
        points: dict[float, dict[str, float]] = {}
        for name, value in values.items():
            for at, known in self._new_points(name, epoch, value):
                points.setdefault(at, {})[name] = known
        constant = {name: value for name, value in values.items() if name not in self._has_curve}
        self.attempt(self.run.summary.update, constant)
        for at in sorted(points):
            self.attempt(self.run.log, {"epoch": at, **points[at]})

    def show_pictures(self, paths: list[Path]) -> None:
        """Log pictures under their file names."""
        import wandb

        self.run.log({f"plots/{path.stem}": [wandb.Image(str(path))] for path in paths})

    def show_table(self, key: str, columns: list[Any], rows: list[list[Any]]) -> None:
        """Log a table."""
        import wandb

        self.run.log({key: wandb.Table(columns=columns, data=rows)})

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Call `action`, unless W&B has failed before; if it does now, say so."""
        if self._is_lost:
            return
        try:
            action(*arguments)
        except Exception as error:  # a service that died, a full disk, a server that refuses
            self._is_lost = True
            reason = one_line(str(error)) or type(error).__name__
            log.warning(
                "Weights & Biases gets no more of this job (%s); all results are in the job's "
                "folder",
                reason,
            )

    def finish(self, exit_code: int) -> None:
        """End the run, within a time limit."""
        try:
            self.run.finish(exit_code=exit_code)
        except Exception as error:
            if not isinstance(error, TimeoutError):
                end_service()
            reason = one_line(str(error)) or type(error).__name__
            log.warning(
                "not all was uploaded to Weights & Biases (%s); wandb sync %s does that later",
                *(reason, Path(self.run.dir).parent),
            )

    def _new_points(self, name: str, epoch: float, value: float) -> Iterator[tuple[float, float]]:
        """Epoch and value of what the curve of this metric now gets."""
        first_epoch, constant = self._first.setdefault(name, (epoch, value))
        if name not in self._has_curve and value != constant:
            self._has_curve.add(name)
            yield first_epoch, constant
            if self._last_epoch[name] != first_epoch:
                yield self._last_epoch[name], constant
        self._last_epoch[name] = epoch
        if name in self._has_curve:
            yield epoch, value


def make_loggers(job: Job) -> list[Logger]:
    """The logger that the configuration names, if it names one; it is closed with the job."""
    loggers: list[Logger] = []
    if job.rank > 0:
        return loggers
    kind = job.config["logger"]["name"]
    if kind == "wandb":
        loggers.append(_wandb_history(job))
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
        import wandb

        summary, targets = prediction.summary, prediction.targets
        assert targets is not None
        confidences, classes = summary["probabilities"].max(-1)
        entropy, names = summary["entropy"], data.class_names
        rows = [
            [
                wandb.Image(_pixels(data.test.inputs[row], data.white)),
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
            path = job.folder / "checkpoint.ckpt"
            logger.attempt(logger.run.log_artifact, _artifact(job, _bits(job.config), path))


def _wandb_histories(loggers: list[Logger]) -> Iterator[WandbHistory]:
    return (logger for logger in loggers if isinstance(logger, WandbHistory))


def _wandb_history(job: Job) -> WandbHistory:
    config, options = job.config, job.config["logger"]
    quant = config["quant"]
    if job.verb == "evaluate":
        stage = "evaluate"
    else:
        stage = "float" if quant["name"] == "none" else quant["mode"]
    group = options["group"] or job.sweep
    run = start_run(
        job.folder,
        has_artifacts=bool(options["artifacts"]),
        id=job.id,  # a resumed job goes on in its run
        resume="allow",
        name=_run_name(config, _bits(config)),
        project=valid_name(str(options["project"] or "bqnn")),
        entity=options["entity"] and valid_name(str(options["entity"])),
        group=group and valid_name(str(group)),
        job_type=stage,
        tags=_tags(config),
        config=config,
    )
    logger = WandbHistory(run)
    # Without this, the next job of the process would go on in this job's run.
    job.at_end(logger.finish)
    # Charts are those of what changes over epochs, without one of the epoch itself.
    logger.attempt(partial(run.define_metric, "epoch", hidden=True))
    logger.attempt(partial(run.define_metric, "*", step_metric="epoch"))
    if options["artifacts"] and "checkpoint" in config:
        logger.attempt(_use_checkpoint, run, job)
    return logger


def _tags(config: Mapping[str, Any]) -> list[str]:
    """The method, the task and those that were asked for, each once."""
    asked = config["logger"]["tags"] or []
    names = [asked] if isinstance(asked, str) else asked
    tags = [config["method"]["name"], config["task"]["name"], *names]
    return list(dict.fromkeys(valid_name(str(tag), LONGEST_TAG) for tag in tags))


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
    """A name for the run, and for the artifact of its checkpoint."""
    ending = f"-{bits}-s{config['seed']}"  # which tells runs apart, and is not to be cut
    start = f"{config['method']['name']}-{config['task']['name']}"
    return valid_name(start, LONGEST_NAME - len(ending)) + ending


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
