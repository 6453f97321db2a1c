"""Train a network: python train.py method=bbb task=digits"""

from typing import Any

from bqnn.jobs.job import Job
from bqnn.jobs.launch import launch
from bqnn.jobs.terminal import say

FILES = ("checkpoint.ckpt", "metrics.csv", "metrics.json", "predictions.npz")


def train(job: Job) -> None:
    # Imported here, so that a mistake on the command line is answered at once.
    from bqnn.checkpoints.recipe import build, load, make_recipe
    from bqnn.data.task import make_data
    from bqnn.evaluation.results import (
        Evaluation,
        draw_pictures,
        evaluate,
        require_results,
        table,
        write_metrics,
        write_predictions,
    )
    from bqnn.jobs.isolation import leave_as_found
    from bqnn.quant.callback import quantization_callbacks
    from bqnn.training.callbacks import EpochTimer
    from bqnn.training.loggers import (
        log_checkpoint,
        log_final,
        log_pictures,
        log_uncertain,
        make_loggers,
    )
    from bqnn.training.progress import evaluation_progress
    from bqnn.training.trainer import fit, make_trainer, measure

    leave_as_found(job)
    config = job.config
    data = make_data(config)
    model = build(make_recipe(config, data.facts()))
    loggers = make_loggers(job)
    timer, evaluation = EpochTimer(job), Evaluation()
    callbacks = [timer, evaluation, *quantization_callbacks(config["quant"])]
    trainer = make_trainer(job, loggers, callbacks, validate=data.val is not None)

    fit(job, trainer, model, data)
    num_samples, show = model.available_samples, config["trainer"]["progress_bar"]
    metrics = {"num_samples": num_samples}
    if data.val is not None:
        metrics |= measure(trainer.validate, model, data)
    metrics |= measure(trainer.test, model, data)
    if not trainer.is_global_zero:
        return

    splits = ["val", "test"]
    if config["quant"]["name"] != "none":  # test/ was simulated
        integer = load(job.folder / "checkpoint.ckpt", "int8")
        with evaluation_progress("int8", ["test"], num_samples, show) as progress:
            _, executed = evaluate(integer, data.test, data, num_samples, progress)
        metrics |= {f"int8/test/{name}": value for name, value in executed.items()}
        splits.append("int8/test")

    metrics |= timer.metrics()
    write_metrics(job.folder, metrics)
    write_predictions(job.folder, evaluation.predictions)
    log_final(loggers, metrics)
    log_uncertain(loggers, model, data, evaluation.predictions)
    promised = [*FILES, *(["best.ckpt"] if config["trainer"]["save_best"] else [])]
    if config["plots"]:
        pictures = draw_pictures(job.folder, model, data, evaluation.predictions)
        log_pictures(loggers, pictures)
        promised += pictures
    say(table(metrics, splits))
    say(f"\n{timer}\nresults in {job.folder}")
    require_results(job.folder, metrics, promised)
    log_checkpoint(loggers, job)


def check(config: dict[str, Any], is_sweep: bool) -> None:
    from bqnn.commands.choices import check_training
    from bqnn.training.trainer import refuse_devices

    check_training(config)
    refuse_devices(config["trainer"], may_be_several=not is_sweep)


if __name__ == "__main__":
    launch(train, "train", check)
