"""Evaluate trained networks: python evaluate.py checkpoint=outputs/.../checkpoint.ckpt"""

from typing import Any

from bqnn.jobs.job import Job, run_parts
from bqnn.jobs.launch import launch
from bqnn.jobs.terminal import say

FILES = ("metrics.json", "predictions.npz", "uncertainty.npz", "risk_coverage.csv")


def evaluate(job: Job) -> None:
    """Evaluate the network at the path, or each that the pattern stands for."""
    from bqnn.checkpoints.file import find_checkpoints
    from bqnn.checkpoints.recipe import described

    configs, numeric = [], job.config["numeric"]
    stage = None if numeric is None else "quantized"
    for path, recipe in find_checkpoints(job.config["checkpoint"], stage).items():
        config = {**job.config, **described(recipe), "checkpoint": str(path)}
        if recipe is not None and recipe["stage"] != "float":
            config["numeric"] = numeric or "simulated"
        configs.append(config)
    run_parts(job, configs, evaluate_one)


def evaluate_one(job: Job) -> None:
    from bqnn.checkpoints.recipe import load
    from bqnn.data.task import make_data
    from bqnn.evaluation.results import (
        Predictions,
        draw_pictures,
        require_results,
        write_metrics,
        write_predictions,
    )
    from bqnn.evaluation.suite import judge, make_sets, predict_sets
    from bqnn.evaluation.suite_results import (
        draw_suite,
        suite_table,
        write_curves,
        write_uncertainty,
    )
    from bqnn.jobs.isolation import leave_as_found
    from bqnn.training.loggers import log_final, log_pictures, log_uncertain, make_loggers
    from bqnn.training.process import prepare_torch
    from bqnn.training.progress import evaluation_progress

    leave_as_found(job)
    config, accelerator = job.config, prepare_torch(job)
    numeric = config["numeric"]
    allow_saturation = config["allow_saturation"]
    model = load(config["checkpoint"], numeric, allow_saturation=allow_saturation)
    num_samples = model.check_samples(config["num_samples"])
    if accelerator != "cpu" and numeric != "int8":
        model.cuda()
    data = make_data(config)
    sets = make_sets(data, config["suite"])
    loggers = make_loggers(job)

    show = config["trainer"]["progress_bar"]
    with evaluation_progress(numeric or "float", list(sets), num_samples, show) as progress:
        predictions = predict_sets(model, data, sets, num_samples, progress)
    findings = judge(model.likelihood, predictions, config["convergence"])
    test = Predictions(predictions["test"].samples, data.test.targets)

    prefix = "" if numeric is None else f"{numeric}/"
    metrics = {f"{prefix}{name}": value for name, value in findings.metrics.items()}
    metrics |= {"num_samples": num_samples}
    write_metrics(job.folder, metrics)
    write_predictions(job.folder, test)
    write_uncertainty(job.folder, predictions)
    write_curves(job.folder, findings)
    log_final(loggers, metrics)
    log_uncertain(loggers, model, data, test)
    promised = [*FILES]
    if config["plots"]:
        pictures = draw_pictures(job.folder, model, data, test)
        pictures += draw_suite(job.folder, findings)
        log_pictures(loggers, pictures)
        promised += pictures
    say(suite_table(findings.metrics))
    say(f"\n{num_samples} draws; results in {job.folder}")
    require_results(job.folder, metrics, promised)


def check(config: dict[str, Any], is_sweep: bool) -> None:
    from bqnn.training.trainer import refuse_devices

    refuse_devices(config["trainer"], may_be_several=False)


if __name__ == "__main__":
    launch(evaluate, "evaluate", check)
