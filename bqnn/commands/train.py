"""The verb of `python train.py`: train a network, and evaluate it on validation and test rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger

from bqnn.checkpoints.recipe import build, load, make_recipe
from bqnn.commands.choices import check_training
from bqnn.commands.predictions import predict
from bqnn.data import TensorData
from bqnn.data.task import check_data, make_data
from bqnn.evaluation.figures import draw_results
from bqnn.evaluation.results import require_results, write_metrics, write_predictions
from bqnn.evaluation.suite import score_sets, split_sets
from bqnn.evaluation.tables import split_table
from bqnn.inference.predictions import Prediction
from bqnn.jobs.isolation import leave_as_found
from bqnn.jobs.job import Job
from bqnn.jobs.terminal import say
from bqnn.methods import Method
from bqnn.quant.callback import quantization_callbacks
from bqnn.training.callbacks import EpochTimer
from bqnn.training.loggers import (
    log_checkpoint,
    log_figures,
    log_final,
    log_uncertain,
    make_loggers,
)
from bqnn.training.trainer import fit, make_trainer, refuse_devices, trained_conditions

FILES = ("checkpoint.ckpt", "metrics.csv", "metrics.json", "predictions.npz")


def check(config: dict[str, Any], is_sweep: bool) -> None:
    """Refuse a configuration from which no training can be built.

    Raises:
        FileNotFoundError: The file or the folder of the task does not exist.
        ValueError: A name, an option, a device or a column is refused.
    """
    check_training(config)
    refuse_devices(config["trainer"], allow_several=not is_sweep)
    check_data(config)


def run(job: Job) -> None:
    """Train the network of a job and write its results."""
    leave_as_found(job)
    data = make_data(job.config)
    model = build(make_recipe(job.config, data.recipe_facts()))
    loggers, timer = make_loggers(job), EpochTimer(job)
    callbacks = [timer, *quantization_callbacks(job.config["quant"])]
    trainer = make_trainer(job, loggers, callbacks, validate=data.val is not None)

    fit(job, trainer, model, data)
    if not trainer.is_global_zero:
        return
    num_samples = model.check_samples(None)
    predictions = predict_splits(job, trainer, model, data, num_samples)
    counts = {"num_samples": num_samples, "test_share": data.tested_share}
    metrics = {**counts, **score_sets(predictions)}
    if "val" in predictions:
        found = model.diagnostics(predictions["val"])
        metrics |= {f"val/{name}": value for name, value in found.items()}
    if is_quantized(job):
        metrics |= score_int8(job, data, num_samples)
    metrics |= timer.metrics()

    files = write_results(job, loggers, model, data, predictions["test"], metrics)
    say(split_table(metrics, ["val", "test", *(["int8/test"] if is_quantized(job) else [])]))
    say(f"\n{timer}\nresults in {job.folder}")
    require_results(job.folder, metrics, files)
    log_checkpoint(loggers, job)


def is_quantized(job: Job) -> bool:
    """Return whether a training uses fake quantization; its test/ metrics are then simulated."""
    return bool(job.config["quant"]["name"] != "none")


def predict_splits(
    job: Job, trainer: pl.Trainer, model: Method, data: TensorData, num_samples: int
) -> dict[str, Prediction]:
    """Predict the test rows, and the validation rows if there are any."""
    sets = split_sets(data, ["val", "test"])
    numeric = "simulated" if is_quantized(job) else "float"
    with trained_conditions(trainer, model):
        return predict(job, numeric, model, sets, data.normalize, num_samples)


def score_int8(job: Job, data: TensorData, num_samples: int) -> dict[str, float]:
    """Compute the test metrics of the network in int8."""
    integer = load(job.folder / "checkpoint.ckpt", "int8", trust=True)  # it is the job's own
    sets = split_sets(data, ["test"])
    metrics = score_sets(predict(job, "int8", integer, sets, data.normalize, num_samples))
    return {f"int8/{name}": value for name, value in metrics.items()}


def write_results(
    job: Job,
    loggers: list[Logger],
    model: Method,
    data: TensorData,
    test: Prediction,
    metrics: Mapping[str, float],
) -> list[str | Path]:
    """Write and log metrics, predictions and figures, and return the expected files."""
    write_metrics(job.folder, metrics)
    write_predictions(job.folder, test)
    log_final(loggers, metrics)
    log_uncertain(loggers, data, test)
    expected: list[str | Path] = [*FILES]
    if job.config["trainer"]["save_best"]:
        expected.append("best.ckpt")
    if job.config["plots"]:
        figures = draw_results(job.folder, model, data, test)
        log_figures(loggers, figures)
        expected += figures
    return expected
