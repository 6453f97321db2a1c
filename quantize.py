"""Quantize trained networks: python quantize.py checkpoint=outputs/.../checkpoint.ckpt"""

from copy import deepcopy
from typing import Any

from bqnn.arguments import prefixed
from bqnn.jobs.job import Job, run_parts
from bqnn.jobs.launch import launch
from bqnn.jobs.terminal import say
from bqnn.quant.spec import QuantSpec

FILES = ("checkpoint.ckpt", "metrics.json", "predictions.npz", "quantization.csv", "size.json")


def quantize(job: Job) -> None:
    """Quantize the network at the path, or each that the pattern stands for."""
    QuantSpec.from_config(job.config["quant"])
    # Imported here, so that a mistake on the command line is answered at once.
    from bqnn.checkpoints.file import find_checkpoints
    from bqnn.checkpoints.recipe import described

    configs = []
    found = find_checkpoints(job.config["checkpoint"], "float", job.config["select"])
    for path, recipe in found.items():
        configs.append({**described(recipe), **job.config, "checkpoint": str(path)})
    run_parts(job, configs, quantize_one)


def quantize_one(job: Job) -> None:
    from bqnn.checkpoints.recipe import NUMERICS, load
    from bqnn.data.task import make_data
    from bqnn.evaluation.results import (
        comparison_table,
        draw_pictures,
        draw_weights,
        evaluate,
        require_results,
        write_layers,
        write_metrics,
        write_predictions,
    )
    from bqnn.jobs.isolation import leave_as_found
    from bqnn.quant.callback import (
        calibrate_module,
        fine_tuning_optimizer,
        quantization_callbacks,
        quantize_module,
    )
    from bqnn.seeds import Stream
    from bqnn.training.callbacks import EpochTimer, save_checkpoint
    from bqnn.training.loggers import (
        log_checkpoint,
        log_final,
        log_layers,
        log_pictures,
        log_uncertain,
        make_loggers,
    )
    from bqnn.training.progress import evaluation_progress
    from bqnn.training.trainer import fit, make_trainer

    leave_as_found(job)
    options = job.config["quant"]
    spec, tuning = QuantSpec.from_config(options), options["fine_tuning"]
    model = load(job.config["checkpoint"])
    data = make_data(job.config)
    loggers = make_loggers(job)
    num_samples = model.check_samples(job.config["num_samples"])
    show = job.config["trainer"]["progress_bar"]
    with evaluation_progress("float", ["test"], num_samples, show) as progress:
        evaluations = {"float": evaluate(model, data.test, data, num_samples, progress)}

    path, timer = job.folder / "checkpoint.ckpt", EpochTimer(job)
    tuned = options["mode"] == "qat"
    if tuned:
        callbacks = [timer, *quantization_callbacks(options)]
        trainer = make_trainer(job, loggers, callbacks, validate=data.val is not None)
        model = model.fine_tuning(fine_tuning_optimizer(options), tuning["prior_weight"])
        start = deepcopy(model)
        with prefixed("quant"):
            quantize_module(start, spec)
        data.order = Stream.FINE_TUNING_ORDER
        if tuning["seed"] is not None:  # of batches and noise; validation rows stay what they were
            model.seed = data.seed = tuning["seed"]
        fit(job, trainer, model, data)
    else:
        trainer = make_trainer(job, loggers, [], validate=data.val is not None)
        with prefixed("quant"):
            calibrate_module(model, spec, data, tuning["calibration_batches"])
        start = model
        save_checkpoint(trainer, model, path)

    models = {numeric: load(path, numeric) for numeric in NUMERICS}
    for numeric, quantized in models.items():
        with evaluation_progress(numeric, ["test"], num_samples, show) as progress:
            evaluations[numeric] = evaluate(quantized, data.test, data, num_samples, progress)

    metrics = {
        f"{numeric}/test/{name}": value
        for numeric, (_, values) in evaluations.items()
        for name, value in values.items()
    }
    metrics |= {"num_samples": num_samples} | timer.metrics()
    predictions, _ = evaluations["int8"]
    write_metrics(job.folder, metrics)
    write_predictions(job.folder, predictions)
    layers, size = write_layers(job.folder, start, models["simulated"], models["int8"], data)
    log_final(loggers, metrics | {f"size/{name}": count for name, count in size.items()})
    log_layers(loggers, layers)
    log_uncertain(loggers, models["int8"], data, predictions)
    promised = [*FILES, *(["best.ckpt"] if tuned and job.config["trainer"]["save_best"] else [])]
    if job.config["plots"]:
        pictures = draw_pictures(job.folder, models["int8"], data, predictions)
        pictures += draw_weights(job.folder, models["simulated"])
        log_pictures(loggers, pictures)
        promised += pictures
    say(comparison_table(metrics))
    say(f"\n{timer}\nresults in {job.folder}")
    require_results(job.folder, metrics, promised)
    log_checkpoint(loggers, job)


def check(config: dict[str, Any], is_sweep: bool) -> None:
    from bqnn.commands.choices import check_optimizer
    from bqnn.training.trainer import refuse_devices

    refuse_devices(config["trainer"], may_be_several=False)
    check_optimizer("quant.fine_tuning.optimizer", config["quant"]["fine_tuning"]["optimizer"])


if __name__ == "__main__":
    launch(quantize, "quantize", check)
