"""Quantize trained networks: python quantize.py checkpoint=outputs/.../checkpoint.ckpt"""

from copy import deepcopy
from typing import Any

from bqnn.config import launch
from bqnn.quant.spec import QuantSpec
from bqnn.run import Job, run_parts
from bqnn.terminal import say


def quantize(job: Job) -> None:
    """Quantize the network at the path, or each that the pattern stands for."""
    QuantSpec.from_config(job.config["quant"])
    # Imported here, so that a mistake on the command line is answered at once.
    from bqnn.checkpoint import find_checkpoints
    from bqnn.recipe import described

    configs = []
    found = find_checkpoints(job.config["checkpoint"], "float", job.config["select"])
    for path, recipe in found.items():
        configs.append({**described(recipe), **job.config, "checkpoint": str(path)})
    run_parts(job, configs, quantize_one)


def quantize_one(job: Job) -> None:
    from bqnn.checkpoint import save_checkpoint
    from bqnn.isolation import leave_as_found
    from bqnn.loggers import (
        log_checkpoint,
        log_final,
        log_layers,
        log_pictures,
        log_uncertain,
        make_loggers,
    )
    from bqnn.quant.callback import (
        calibrate_module,
        fine_tuning_optimizer,
        quantization_callbacks,
        quantize_module,
    )
    from bqnn.recipe import NUMERICS, load, make_data
    from bqnn.results import (
        comparison_table,
        draw_pictures,
        draw_weights,
        evaluate,
        write_layers,
        write_metrics,
        write_predictions,
    )
    from bqnn.trainer import EpochTimer, fit, make_trainer

    leave_as_found(job)
    options = job.config["quant"]
    spec, tuning = QuantSpec.from_config(options), options["fine_tuning"]
    model = load(job.config["checkpoint"])
    data = make_data(job.config)
    loggers = make_loggers(job)
    num_samples = model.check_samples(job.config["num_samples"])
    evaluations = {"float": evaluate(model, data.test, data, num_samples)}

    path, timer = job.folder / "checkpoint.ckpt", EpochTimer(job)
    if options["mode"] == "qat":
        callbacks = [timer, *quantization_callbacks(options)]
        trainer = make_trainer(job, loggers, callbacks, validate=data.val is not None)
        model.fine_tune(fine_tuning_optimizer(options), tuning["prior_weight"])
        start = deepcopy(model)
        quantize_module(start, spec)
        if tuning["seed"] is not None:  # of batches and noise; validation rows stay what they were
            model.seed = data.seed = tuning["seed"]
        fit(job, trainer, model, data)
    else:
        trainer = make_trainer(job, loggers, [], validate=data.val is not None)
        calibrate_module(model, spec, data, tuning["calibration_batches"])
        start = model
        save_checkpoint(trainer, model, path)

    models = {numeric: load(path, numeric) for numeric in NUMERICS}
    for numeric, quantized in models.items():
        evaluations[numeric] = evaluate(quantized, data.test, data, num_samples)

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
    log_checkpoint(loggers, job)
    if job.config["plots"]:
        pictures = draw_pictures(job.folder, models["int8"], data, predictions)
        log_pictures(loggers, [*pictures, *draw_weights(job.folder, models["simulated"])])
    say(comparison_table(metrics))
    say(f"\n{timer}\nresults in {job.folder}")


def check(config: dict[str, Any]) -> None:
    from bqnn.choices import check_optimizer

    check_optimizer("quant.fine_tuning.optimizer", config["quant"]["fine_tuning"]["optimizer"])


if __name__ == "__main__":
    launch(quantize, "quantize", check)
