"""The verb of `python evaluate.py`: evaluate trained networks on a suite of sets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from bqnn.checkpoints.file import find_checkpoints
from bqnn.checkpoints.recipe import described, load
from bqnn.commands.predictions import predict
from bqnn.data import TensorData
from bqnn.data.task import make_data
from bqnn.evaluation.figures import draw_results, draw_suite
from bqnn.evaluation.results import (
    require_results,
    write_curves,
    write_metrics,
    write_predictions,
    write_uncertainty,
)
from bqnn.evaluation.suite import Findings, judge, make_sets
from bqnn.evaluation.tables import suite_table
from bqnn.jobs.isolation import leave_as_found
from bqnn.jobs.job import Job
from bqnn.jobs.parts import run_parts
from bqnn.jobs.terminal import say
from bqnn.methods import Method
from bqnn.training.loggers import log_figures, log_final, log_uncertain, make_loggers
from bqnn.training.process import prepare_torch
from bqnn.training.trainer import refuse_devices

FILES = ("metrics.json", "predictions.npz", "uncertainty.npz", "risk_coverage.csv")


def check(config: dict[str, Any], is_sweep: bool) -> None:
    """Refuse several devices, and a GPU that does not exist.

    Raises:
        ValueError: The devices are refused.
    """
    refuse_devices(config["trainer"], allow_several=False)


def run(job: Job) -> None:
    """Evaluate the checkpoint of a path, or all checkpoints of a pattern."""
    configs, numeric = [], job.config["numeric"]
    stage = None if numeric is None else "quantized"
    for path, recipe in find_checkpoints(job.config["checkpoint"], stage).items():
        config = {**job.config, **described(recipe), "checkpoint": str(path)}
        if recipe is not None and recipe["stage"] != "float":
            config["numeric"] = numeric or "simulated"
        configs.append(config)
    run_parts(job, configs, evaluate)


def evaluate(job: Job) -> None:
    """Evaluate one network and write its results."""
    leave_as_found(job)
    model = load_model(job)
    num_samples = model.check_samples(job.config["num_samples"])
    data = make_data(job.config, model.recipe)
    sets = make_sets(data, job.config["suite"])
    loggers = make_loggers(job)
    numeric = job.config["numeric"]
    predictions = predict(job, numeric or "float", model, sets, data.normalize, num_samples)
    findings = judge(predictions, job.config["convergence"])
    prefix = "" if numeric is None else f"{numeric}/"
    metrics = {f"{prefix}{name}": value for name, value in findings.metrics.items()}
    metrics["num_samples"] = num_samples

    files = write_results(job, loggers, model, data, findings, metrics)
    say(suite_table(findings.metrics))
    say(f"\n{num_samples} draws; results in {job.folder}")
    require_results(job.folder, metrics, files)


def load_model(job: Job) -> Method:
    """Load the network in the configured numeric. int8 runs on the CPU only."""
    accelerator, numeric = prepare_torch(job), job.config["numeric"]
    model = load(job.config["checkpoint"], numeric, trust=job.config["trust"])
    return model if accelerator == "cpu" or numeric == "int8" else model.cuda()


def write_results(
    job: Job,
    loggers: list[Logger],
    model: Method,
    data: TensorData,
    findings: Findings,
    metrics: Mapping[str, float],
) -> list[str | Path]:
    """Write and log metrics, predictions and figures, and return the expected files."""
    test = findings.predictions["test"]
    write_metrics(job.folder, metrics)
    write_predictions(job.folder, test)
    write_uncertainty(job.folder, findings.predictions)
    write_curves(job.folder, findings)
    log_final(loggers, metrics)
    log_uncertain(loggers, data, test)
    expected: list[str | Path] = [*FILES]
    if job.config["plots"]:
        figures = draw_results(job.folder, model, data, test)
        figures += draw_suite(job.folder, findings)
        log_figures(loggers, figures)
        expected += figures
    return expected
