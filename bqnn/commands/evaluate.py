"""The verb of `python evaluate.py`: evaluate trained networks on a suite of sets."""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from bqnn.arguments import renamed
from bqnn.checkpoints.calibrated import save_calibrated
from bqnn.checkpoints.file import find_checkpoints
from bqnn.checkpoints.recipe import described, load
from bqnn.commands.predictions import predict
from bqnn.data import TensorData
from bqnn.data.task import make_data
from bqnn.evaluation.conformal import fit_conformal
from bqnn.evaluation.figures import draw_results, draw_suite
from bqnn.evaluation.results import (
    require_results,
    write_calibration,
    write_curves,
    write_metrics,
    write_predictions,
    write_uncertainty,
)
from bqnn.evaluation.suite import (
    EvaluationSet,
    Findings,
    judge,
    make_sets,
    predict_sets_once,
    validation_set,
)
from bqnn.evaluation.tables import suite_table
from bqnn.inference.calibration import check_calibration, fit_calibration
from bqnn.inference.conformal import conformal_rank
from bqnn.inference.early_stop import check_early_stop
from bqnn.inference.moments import NUM_SAMPLES
from bqnn.inference.predictions import Prediction
from bqnn.jobs.isolation import leave_as_found
from bqnn.jobs.job import Job
from bqnn.jobs.parts import run_parts
from bqnn.jobs.terminal import say
from bqnn.methods import Method
from bqnn.training.loggers import log_figures, log_final, log_uncertain, make_loggers
from bqnn.training.process import find_device, prepare_torch
from bqnn.training.trainer import refuse_devices

FILES = ("predictions.npz", "uncertainty.npz", "risk_coverage.csv")
CALIBRATED = "calibrated"  # the folder of the calibrated results, and the start of their metrics


@dataclass(frozen=True, eq=False)
class Judged:
    """A model, which may be calibrated, and the findings of its suite."""

    model: Method
    findings: Findings


def check(config: dict[str, Any], is_sweep: bool) -> None:
    """Refuse several devices, a GPU that does not exist, and options that contradict each other.

    Raises:
        ValueError: The devices or the options are refused.
    """
    refuse_devices(config["trainer"], allow_several=False)
    tolerance = check_early_stop(*(config[k] for k in ("num_samples", "max_samples", "tolerance")))
    if config["predictive"] == "moments" and config["numeric"] == "int8":
        raise ValueError(
            "predictive=moments with numeric=int8: integers have no variances; choose "
            "numeric=simulated, or predictive=draws"
        )
    if tolerance is not None and config["predictive"] == "moments":
        raise ValueError(
            f"tolerance={tolerance} with predictive=moments: one pass cannot stop early; leave "
            "one of the two out"
        )
    if config["predictive"] == "moments":
        for key in ("convergence", "save_calibrated"):
            if config[key]:
                raise ValueError(
                    f"{key}=true with predictive=moments: it is of draws of the network, and one "
                    "pass has none; leave out one of the two"
                )
    if tolerance is not None:
        for key in ("convergence", "conformal", "calibrate"):
            if config[key]:
                raise ValueError(
                    f"tolerance={tolerance} with {key}: it needs all draws of each row; leave out "
                    "one of the two"
                )
    if config["save_calibrated"] and config["calibrate"] is None:
        raise ValueError(
            "save_calibrated=true: there is no calibration to save; add calibrate=temperature"
        )
    if config["save_calibrated"] and config["numeric"] == "unquantized":
        raise ValueError(
            "save_calibrated=true: the saved network would be simulated or int8, but numeric="
            "unquantized fits the calibration without rounding; choose numeric=simulated or int8"
        )


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
    is_single = job.config["predictive"] == "moments"
    num_samples = requested_samples(job, model)
    data = make_data(job.config, model.recipe)
    if job.config["calibrate"] is not None:
        check_calibration(job.config["calibrate"], model.likelihood)
        model.calibration = None  # of an earlier evaluation, which the new one replaces
    sets, fitted_on = make_sets(data, job.config["suite"]), fitting_set(job, data)
    loggers = make_loggers(job)
    numeric = job.config["numeric"]
    to_predict, factor = {**sets, **fitted_on}, {}
    if is_single:
        rows = (data.train if data.val is None else data.val).inputs
        predictions, found = predict_sets_once(model, to_predict, data.normalize, rows, num_samples)
        factor = {"moments/factor": found}
    else:
        tolerance = job.config["tolerance"]
        predictions = predict(
            job, numeric or "float", model, to_predict, data.normalize, num_samples, tolerance
        )
    judged = {"": Judged(model, judge_sets(job, predictions, sets))}
    if job.config["calibrate"] is not None:
        judged[CALIBRATED] = calibrate(job, model, predictions, sets)
    prefix = "" if numeric is None else f"{numeric}/"
    found_metrics = {**all_metrics(job, judged), **factor}
    metrics = {f"{prefix}{name}": value for name, value in found_metrics.items()}
    metrics |= {"num_samples": num_samples, "test_share": data.tested_share}

    files = write_results(job, loggers, data, judged, metrics)
    say(suite_table(judged[""].findings.metrics))
    if CALIBRATED in judged:
        say(f"\ncalibrated by {job.config['calibrate']}, as in calibration.json:")
        say(suite_table(judged[CALIBRATED].findings.metrics))
    most = "" if job.config["tolerance"] is None else "at most "
    how = " from the moments of a single pass" if is_single else ""
    say(f"\n{most}{num_samples} draws{how}; results in {job.folder}")
    require_results(job.folder, metrics, files)


def requested_samples(job: Job, model: Method) -> int:
    """Return the number of draws of each row, or their largest number if rows stop early."""
    if job.config["predictive"] == "moments":
        return job.config["num_samples"] or NUM_SAMPLES
    if job.config["tolerance"] is None:
        return model.check_samples(job.config["num_samples"])
    with renamed(lambda name: "max_samples" if name == "num_samples" else name):
        return model.check_samples(job.config["max_samples"])


def load_model(job: Job) -> Method:
    """Load the network in the configured numeric. int8 runs on the CPU only."""
    prepare_torch(job)
    numeric = job.config["numeric"]
    model = load(job.config["checkpoint"], numeric, trust=job.config["trust"])
    return model if numeric == "int8" else model.to(find_device(job.config["trainer"]))


def fitting_set(job: Job, data: TensorData) -> dict[str, EvaluationSet]:
    """Return the validation rows as `val` if something is fitted on them, else nothing.

    Raises:
        ValueError: The data set has no validation rows, or too few.
    """
    wanted = [f"{k}={v}" for k in ("calibrate", "conformal") if (v := job.config[k]) is not None]
    if not wanted:
        return {}
    found = validation_set(data, wanted[0])
    if job.config["conformal"] is not None:
        with renamed({"alpha": "conformal"}.__getitem__):
            conformal_rank(len(found.inputs), job.config["conformal"])
    return {"val": found}


def judge_sets(job: Job, predictions: Mapping[str, Prediction], sets: Iterable[str]) -> Findings:
    """Judge the predictions of the suite's sets; conformal sets are fitted on `val`."""
    alpha = job.config["conformal"]
    conformal = None if alpha is None else fit_conformal(predictions["val"], alpha)
    shown = {name: predictions[name] for name in sets}
    return judge(shown, job.config["convergence"], conformal)


def calibrate(
    job: Job, model: Method, predictions: Mapping[str, Prediction], sets: Iterable[str]
) -> Judged:
    """Fit a calibration on the validation rows, write it, and judge the calibrated predictions."""
    validation = predictions["val"]
    assert validation.targets is not None
    calibration = fit_calibration(
        job.config["calibrate"], model.likelihood, validation.samples, validation.targets
    )
    write_calibration(job.folder, calibration, validation)
    if job.config["save_calibrated"]:
        path = job.folder / f"{CALIBRATED}.ckpt"
        save_calibrated(job.config["checkpoint"], path, calibration)
    calibrated = copy(model)
    calibrated.calibration = calibration
    changed = {name: each.calibrated(calibration) for name, each in predictions.items()}
    return Judged(calibrated, judge_sets(job, changed, sets))


def all_metrics(job: Job, judged: Mapping[str, Judged]) -> dict[str, float]:
    """Collect the metrics as test/nll and calibrated/test/nll, and the numbers of a calibration."""
    metrics = dict(judged[""].findings.metrics)
    if CALIBRATED in judged:
        model, found = judged[CALIBRATED].model, judged[CALIBRATED].findings.metrics
        assert model.calibration is not None
        metrics |= {f"{CALIBRATED}/{name}": value for name, value in found.items()}
        metrics |= {f"calibration/{n}": value for n, value in model.calibration.numbers().items()}
    if job.config["conformal"] is not None:
        metrics["conformal/level"] = 1 - job.config["conformal"]
    return metrics


def write_results(
    job: Job,
    loggers: list[Logger],
    data: TensorData,
    judged: Mapping[str, Judged],
    metrics: Mapping[str, float],
) -> list[str | Path]:
    """Write and log metrics, predictions and figures, and return the expected files."""
    write_metrics(job.folder, metrics)
    log_final(loggers, metrics)
    log_uncertain(loggers, data, judged[""].findings.predictions["test"])
    expected: list[str | Path] = ["metrics.json"]
    for part, each in judged.items():
        folder = job.folder / part
        folder.mkdir(exist_ok=True)
        expected += [folder / name for name in FILES]
        test = each.findings.predictions["test"]
        write_predictions(folder, test)
        write_uncertainty(folder, each.findings.predictions)
        write_curves(folder, each.findings)
        if job.config["conformal"] is not None:
            expected.append(folder / "conformal.csv")
        if job.config["plots"]:
            figures = draw_results(folder, each.model, data, test)
            figures += draw_suite(folder, each.findings)
            if not part:
                log_figures(loggers, figures)
            expected += figures
    if CALIBRATED in judged:
        expected.append("calibration.json")
    if job.config["save_calibrated"]:
        expected.append(f"{CALIBRATED}.ckpt")
    return expected
