"""Where metrics, configuration and pictures go while a job runs."""

import csv
import netrc
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from bqnn.run import Job


class MetricsCsv(Logger):
    """Writes metrics.csv: one header, one row per logged epoch, on disk as soon as it is known.

    The metrics of an epoch's validation come first and wait for those of its training.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = []
        self._rows: list[dict[str, float]] = []
        self._waiting: dict[str, float] = {}

    @property
    def name(self) -> str:
        return "metrics.csv"

    @property
    def version(self) -> int:
        return 0

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._waiting.update(metrics)
        if not any(name.startswith("train/") for name in metrics):
            return
        row, self._waiting = {"step": step or 0, **self._waiting}, {}
        row["epoch"] = int(row["epoch"])
        self._rows.append(row)
        new = sorted(row.keys() - set(self._columns) - {"epoch", "step"})
        if new:  # the first row, or the first with a validation
            self._columns = ["epoch", "step", *sorted({*self._columns[2:], *new})]
            self._write(self._rows, "w")
        else:
            self._write([row], "a")

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any) -> None:
        """Nothing: config.yaml has them."""

    def _write(self, rows: list[dict[str, float]], mode: str) -> None:
        with self.path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


def make_loggers(job: Job) -> list[Logger]:
    """metrics.csv, and the logger that the configuration names; they are closed with the job."""
    loggers: list[Logger] = [MetricsCsv(job.folder / "metrics.csv")]
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
        if not isinstance(logger, MetricsCsv):
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
