"""Train a network: python train.py method=bbb task=digits"""

from typing import Any

from bqnn.config import launch
from bqnn.run import Job
from bqnn.terminal import say


def train(job: Job) -> None:
    # Imported here, so that a mistake on the command line is answered at once.
    from bqnn.isolation import leave_as_found
    from bqnn.loggers import (
        log_checkpoint,
        log_final,
        log_pictures,
        log_uncertain,
        make_loggers,
    )
    from bqnn.quant.callback import quantization_callbacks
    from bqnn.recipe import build, load, make_data, make_recipe
    from bqnn.results import (
        Evaluation,
        draw_pictures,
        evaluate,
        table,
        write_metrics,
        write_predictions,
    )
    from bqnn.trainer import EpochTimer, fit, make_trainer

    leave_as_found(job)
    config = job.config
    data = make_data(config)
    model = build(make_recipe(config, data.facts()))
    loggers = make_loggers(job)
    timer, evaluation = EpochTimer(job), Evaluation()
    callbacks = [timer, evaluation, *quantization_callbacks(config["quant"])]
    trainer = make_trainer(job, loggers, callbacks, validate=data.val is not None)

    fit(job, trainer, model, data)
    metrics = {"num_samples": model.available_samples}
    if data.val is not None:
        metrics |= trainer.validate(model, datamodule=data, verbose=False)[0]
    metrics |= trainer.test(model, datamodule=data, verbose=False)[0]
    if not trainer.is_global_zero:
        return

    splits = ["val", "test"]
    if config["quant"]["name"] != "none":  # test/ was simulated
        integer = load(job.folder / "checkpoint.ckpt", "int8")
        _, executed = evaluate(integer, data.test, data)
        metrics |= {f"int8/test/{name}": value for name, value in executed.items()}
        splits.append("int8/test")

    metrics |= timer.metrics()
    write_metrics(job.folder, metrics)
    write_predictions(job.folder, evaluation.predictions)
    log_final(loggers, metrics)
    log_uncertain(loggers, model, data, evaluation.predictions)
    log_checkpoint(loggers, job)
    if config["plots"]:
        log_pictures(loggers, draw_pictures(job.folder, model, data, evaluation.predictions))
    say(table(metrics, splits))
    say(f"\n{timer}\nresults in {job.folder}")


def check(config: dict[str, Any]) -> None:
    from bqnn.choices import check_training

    check_training(config)


if __name__ == "__main__":
    launch(train, "train", check)
