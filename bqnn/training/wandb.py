"""Log a job to Weights & Biases: curves, tables, figures and checkpoints."""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers import Logger

from bqnn.jobs.job import Job
from bqnn.text import LONGEST_NAME, one_line, valid_name
from bqnn.training.wandb_start import end_service, start_run

if TYPE_CHECKING:
    import numpy as np
    import wandb

log = logging.getLogger(__name__)

LONGEST_TAG = 64  # characters


class WandbHistory(Logger):
    """Logger for Weights & Biases: curves of metrics that change, and a summary of the others.

    A metric gets a curve, with all earlier points, when its value first changes. A failure of
    W&B does not stop the job. The first failure is logged, and nothing is sent after it.

    Args:
        run: The run of W&B.
    """

    def __init__(self, run: "wandb.Run") -> None:
        super().__init__()
        self.run = run
        self._first: dict[str, tuple[float, float]] = {}  # first epoch and value of each metric
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
        """Do nothing, because the run has the whole configuration from its start."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of an epoch, or of the whole job if there is no `epoch` among them.

        Args:
            metrics: The metrics by name, and `epoch`.
            step: Unused, since curves are drawn over epochs.
        """
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

    def log_figures(self, paths: list[Path]) -> None:
        """Log the PNG files of figures under their file names."""
        import wandb

        self.run.log({f"plots/{path.stem}": [wandb.Image(str(path))] for path in paths})

    def image(self, pixels: "np.ndarray") -> "wandb.Image":
        """Return a table cell that shows an image [H, W, C] in uint8."""
        import wandb

        return wandb.Image(pixels)

    def log_table(self, key: str, columns: list[Any], rows: list[list[Any]]) -> None:
        """Log a table with named columns."""
        import wandb

        self.run.log({key: wandb.Table(columns=columns, data=rows)})

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Call `action` unless W&B has failed before, and log the first failure."""
        if self._is_lost:
            return
        try:
            action(*arguments)
        except Exception as error:  # W&B raises many types
            self._is_lost = True
            reason = one_line(str(error)) or type(error).__name__
            log.warning(
                "logging to Weights & Biases failed (%s) and stops for this job; all results are "
                "in the folder of the job",
                reason,
            )

    def finish(self, exit_code: int) -> None:
        """End the run within the time limit of W&B, and log a failure.

        Args:
            exit_code: 0 if the job is done, and 1 otherwise.
        """
        try:
            self.run.finish(exit_code=exit_code)
        except Exception as error:
            if not isinstance(error, TimeoutError):
                end_service()
            reason = one_line(str(error)) or type(error).__name__
            log.warning(
                "the upload to Weights & Biases is incomplete (%s); complete it with wandb sync %s",
                *(reason, Path(self.run.dir).parent),
            )

    def _new_points(self, name: str, epoch: float, value: float) -> Iterator[tuple[float, float]]:
        """Yield the points (epoch, value) to add to the curve of a metric."""
        first_epoch, constant = self._first.setdefault(name, (epoch, value))
        if name not in self._has_curve and value != constant:
            self._has_curve.add(name)
            yield first_epoch, constant
            if self._last_epoch[name] != first_epoch:
                yield self._last_epoch[name], constant
        self._last_epoch[name] = epoch
        if name in self._has_curve:
            yield epoch, value


def start_history(job: Job) -> WandbHistory:
    """Start the W&B run of a job, which ends with the job.

    Args:
        job: The job. The group `logger` of its configuration has the options of the run.

    Returns:
        The logger.
    """
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
        id=job.status.id,  # a resumed job continues its run
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
    # Otherwise the next job of the process would continue the run of this job.
    job.at_end(logger.finish)
    # Use the epoch as the x axis of all charts, without a chart of the epoch itself.
    logger.attempt(partial(run.define_metric, "epoch", hidden=True))
    logger.attempt(partial(run.define_metric, "*", step_metric="epoch"))
    if options["artifacts"] and "checkpoint" in config:
        logger.attempt(_use_checkpoint, run, job)
    return logger


def own_artifact(job: Job) -> "wandb.Artifact":
    """Return the artifact of the checkpoint that the job has written."""
    return _artifact(job, _bits(job.config), job.folder / "checkpoint.ckpt")


def _tags(config: Mapping[str, Any]) -> list[str]:
    """Return the method, the task and the tags of the configuration, without repetitions."""
    asked = config["logger"]["tags"] or []
    names = [asked] if isinstance(asked, str) else asked
    tags = [config["method"]["name"], config["task"]["name"], *names]
    return list(dict.fromkeys(valid_name(str(tag), LONGEST_TAG) for tag in tags))


def _use_checkpoint(run: "wandb.Run", job: Job) -> None:
    """Declare the checkpoint that the job starts from as the input of its run.

    W&B identifies an artifact by its name and content, so this is the artifact that the training
    has logged. W&B shows the connection as lineage.
    """
    bits = "float" if job.verb == "quantize" else _bits(job.config)
    artifact = _artifact(job, bits, Path(job.config["checkpoint"]))
    if run.offline:
        # use_artifact needs the server. This writes the same record, and `wandb sync` uploads it
        # with the rest of the run.
        run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def _artifact(job: Job, bits: str, path: Path) -> "wandb.Artifact":
    import wandb

    artifact = wandb.Artifact(_run_name(job.config, bits), type="model")
    artifact.add_file(str(path), name="checkpoint.ckpt", policy="immutable")  # not copied
    return artifact


def _run_name(config: Mapping[str, Any], bits: str) -> str:
    """Return the name of a run and of the artifact of its checkpoint."""
    ending = f"-{bits}-s{config['seed']}"  # distinguishes runs, so it is never truncated
    start = f"{config['method']['name']}-{config['task']['name']}"
    return valid_name(start, LONGEST_NAME - len(ending)) + ending


def _bits(config: Mapping[str, Any]) -> str:
    quant = config["quant"]
    if quant["name"] == "none":
        return "float"
    return f"w{quant['weight_bits']}a{quant['activation_bits']}"
