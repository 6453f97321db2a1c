"""Where metrics, configuration and pictures go while a job runs."""

import csv
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

from bqnn.files import written_beside
from bqnn.methods import Method
from bqnn.run import Job


class MetricsCsv(Checkpoint):
    """Writes metrics.csv: one header, one row per logged epoch, on disk as soon as it is known.

    The rows are part of every checkpoint, so that a resumed run has those of the epochs that it
    goes on from. Being a Checkpoint, it is called when the epoch's metrics are complete; it has to
    come before the callback that saves.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, float]] = []
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
        if trainer.is_global_zero:
            self._write()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = state_dict["rows"]

    def _write(self) -> None:
        names = sorted({name for row in self._rows for name in row} - {"epoch", "step"})
        with written_beside(self.path) as beside, beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["epoch", "step", *names], restval="")
            writer.writeheader()
            writer.writerows(self._rows)


def make_loggers(job: Job) -> list[Logger]:
    """The logger that the configuration names, if it names one; it is closed with the job."""
    loggers: list[Logger] = []
    if job.rank > 0:
        return loggers
    kind = job.config["logger"]["name"]
    if kind == "wandb":
        loggers.append(_wandb_logger(job))
    elif kind == "csv":
        loggers.append(CSVLogger(job.folder, name="csv", version=""))
        loggers[-1].log_hyperparams(job.config)
    elif kind != "none":
        raise ValueError(f"logger.name={kind!r}: unknown; choose wandb, csv or none")
    return loggers


def log_final(loggers: list[Logger], metrics: Mapping[str, float]) -> None:
    """Log what is known at the end of a job, outside of any epoch."""
    for logger in loggers:
        logger.log_metrics(dict(metrics))


def log_pictures(loggers: list[Logger], paths: list[Path]) -> None:
    """Show pictures in Weights & Biases, under their file names."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            for path in paths:
                logger.log_image(f"plots/{path.stem}", [str(path)])


def _wandb_logger(job: Job) -> WandbLogger:
    import wandb

    config, options = job.config, job.config["logger"]
    method, task, seed = config["method"]["name"], config["task"]["name"], config["seed"]
    quant = config["quant"]
    if quant["name"] == "none":
        stage = bits = "float"
    else:
        stage, bits = quant["mode"], f"w{quant['weight_bits']}a{quant['activation_bits']}"
    # A mode in the environment is the user's word; without a key a run online would ask for one.
    settings = wandb.Settings(silent=True, console="off")
    if "WANDB_MODE" not in os.environ:
        settings.mode = "online" if _has_wandb_key() else "offline"
    run = wandb.init(
        id=job.id,  # a resumed job goes on in its run
        resume="allow",
        name=f"{method}-{task}-{bits}-s{seed}",
        project=options["project"],
        entity=options["entity"],
        group=options["group"] or job.sweep,
        job_type=stage,
        tags=[method, task, *options["tags"]],
        config=config,
        dir=job.folder,
        settings=settings,
    )
    run.define_metric("*", step_metric="epoch")
    # Without this, the next job of the process would go on in this job's run.
    job.at_end(lambda exit_code: wandb.finish(exit_code=exit_code))
    return WandbLogger(experiment=run)


def _has_wandb_key() -> bool:
    """Whether a key is at hand; without one wandb would stop and ask."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
