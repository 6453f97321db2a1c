"""A job's run of Weights & Biases: its curves, tables, pictures and checkpoints."""

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
    """Logs to Weights & Biases: curves of what changes over epochs, and a summary of the rest.

    A metric gets its curve, with all earlier points, when its value first changes. A failure of
    W&B does not stop the job; the log mentions the first one.

    Args:
        run: The run to write to.
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
        """Do nothing: the run has the whole configuration from its start."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of an epoch, or of the whole job where `epoch` is not among them."""
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

    def image(self, pixels: "np.ndarray") -> "wandb.Image":
        """A cell of a table that shows an image, given as uint8 [H, W, C]."""
        import wandb

        return wandb.Image(pixels)

    def show_table(self, key: str, columns: list[Any], rows: list[list[Any]]) -> None:
        """Log a table."""
        import wandb

        self.run.log({key: wandb.Table(columns=columns, data=rows)})

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Call `action`, unless W&B has failed before; log the first failure."""
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
        """The points, as epoch and value, to add to the curve of a metric."""
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
    """Start the run of a job; it ends with the job."""
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
        id=job.status.id,  # a resumed job goes on in its run
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


def own_artifact(job: Job) -> "wandb.Artifact":
    """The artifact of the job's own checkpoint."""
    return _artifact(job, _bits(job.config), job.folder / "checkpoint.ckpt")


def _tags(config: Mapping[str, Any]) -> list[str]:
    """The method, the task and the tags of the configuration, each once."""
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
