"""The verb of `python quantize.py`: quantize trained networks and compare them with float."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from bqnn.arguments import prefixed
from bqnn.checkpoints.file import find_checkpoints
from bqnn.checkpoints.recipe import NUMERICS, described, load
from bqnn.commands.budget import check_budget, has_budget, within_budget
from bqnn.commands.choices import check_optimizer
from bqnn.commands.predictions import predict
from bqnn.data import TensorData
from bqnn.data.task import make_data
from bqnn.evaluation.figures import draw_results, draw_weights
from bqnn.evaluation.results import (
    require_results,
    write_layers,
    write_metrics,
    write_predictions,
)
from bqnn.evaluation.suite import score_sets, split_sets
from bqnn.evaluation.tables import comparison_table
from bqnn.inference.predictions import Prediction
from bqnn.jobs.isolation import leave_as_found
from bqnn.jobs.job import Job
from bqnn.jobs.parts import run_parts
from bqnn.jobs.terminal import say
from bqnn.methods import EnsembleMethod, MemberTraining, Method
from bqnn.quant.callback import (
    calibrate_module,
    fine_tuning_optimizer,
    quantization_callbacks,
    quantize_module,
)
from bqnn.quant.spec import QuantSpec
from bqnn.seeds import Stream
from bqnn.training.callbacks import EpochTimer, save_checkpoint
from bqnn.training.loggers import (
    log_checkpoint,
    log_figures,
    log_final,
    log_layers,
    log_uncertain,
    make_loggers,
)
from bqnn.training.process import find_device, prepare_torch
from bqnn.training.trainer import fit, make_trainer, refuse_devices

log = logging.getLogger(__name__)

CONTROL = "finetuned"  # the folder of a fine-tuning without rounding, and its name in metrics
FILES = ("checkpoint.ckpt", "metrics.json", "predictions.npz", "quantization.csv", "size.json")


def check(config: dict[str, Any], is_sweep: bool) -> None:
    """Refuse several devices, and an optimizer that does not exist.

    Raises:
        ValueError: The devices, the optimizer or its options are refused.
    """
    quant, tuning = config["quant"], config["quant"]["fine_tuning"]
    QuantSpec.from_config(quant)
    for name, is_set in (("control", quant["control"]), ("fine_tuning.imitate", tuning["imitate"])):
        if is_set and quant["mode"] != "qat":
            raise ValueError(
                f"quant.{name}=true: quant.mode={quant['mode']} trains nothing; leave it out, or "
                "set quant.mode=qat"
            )
    check_budget(quant)
    refuse_devices(config["trainer"], allow_several=False)
    check_optimizer("quant.fine_tuning.optimizer", tuning["optimizer"])


def run(job: Job) -> None:
    """Quantize the checkpoint of a path, or all checkpoints of a pattern."""
    configs = []
    found = find_checkpoints(job.config["checkpoint"], "float", job.config["select"])
    for path, recipe in found.items():
        configs.append({**described(recipe), **job.config, "checkpoint": str(path)})
    run_parts(job, configs, quantize)


def quantize(job: Job) -> None:
    """Quantize one network and write its results."""
    leave_as_found(job)
    prepare_torch(job)
    model = load(job.config["checkpoint"], trust=job.config["trust"])
    drop_calibration(model)
    if job.config["quant"]["fine_tuning"]["imitate"] and not isinstance(model, EnsembleMethod):
        raise ValueError(
            "quant.fine_tuning.imitate=true: only the members of an ensemble imitate their "
            f"networks, and the checkpoint is of method={job.config['method']['name']}; leave it "
            "out"
        )
    data = make_data(job.config, model.recipe)
    loggers, timer = make_loggers(job), EpochTimer(job)
    num_samples = model.check_samples(job.config["num_samples"])
    predictions = {"float": predict_splits(job, "float", model, data, num_samples)}
    quant = within_budget(job, loggers, model, data, num_samples)
    if quant["mode"] == "qat":
        control = deepcopy(model) if quant["control"] else None
        start = fine_tune(job, quant, loggers, timer, model, data)
        if control is not None:
            tuned = fine_tune_control(job, quant, control, data)
            predictions[CONTROL] = predict_splits(job, CONTROL, tuned, data, num_samples)
    else:
        start = calibrate(job, quant, loggers, model, data)
    path, trust = job.folder / "checkpoint.ckpt", job.config["trust"]
    models = {numeric: load(path, numeric, trust=trust) for numeric in NUMERICS}
    for numeric, quantized in models.items():
        predictions[numeric] = predict_splits(job, numeric, quantized, data, num_samples)
    scored = {f"{num}/{name}": each for num, of in predictions.items() for name, each in of.items()}
    metrics = score_sets(scored)
    metrics |= {"num_samples": num_samples, "test_share": data.tested_share, **timer.metrics()}

    files = write_results(job, loggers, data, start, models, scored["int8/test"], metrics)
    say(comparison_table(metrics))
    say(f"\n{timer}\nresults in {job.folder}")
    require_results(job.folder, metrics, files)
    log_checkpoint(loggers, job)


def predict_splits(
    job: Job, numeric: str, model: Method, data: TensorData, num_samples: int
) -> dict[str, Prediction]:
    """Predict the test rows on the accelerator of the job; int8 runs on the CPU only.

    If an objective of a search is a metric of validation rows, predict them, too.
    """
    names = ["test", *(["val"] if any("/val/" in name for name in job.config["objective"]) else [])]
    if numeric != "int8":
        model.to(find_device(job.config["trainer"]))
    found = predict(job, numeric, model, split_sets(data, names), data.normalize, num_samples)
    model.cpu()  # layers are compared there
    return found


def drop_calibration(model: Method) -> None:
    """Remove the calibration of a float network, which does not fit its quantized outputs."""
    if model.calibration is None or model.recipe is None:
        return
    log.warning(
        "the checkpoint has a calibration (%s) of its float outputs, which is left out; calibrate "
        "the quantized network by evaluate.py calibrate=...",
        model.calibration.name,
    )
    model.calibration = None
    model.recipe = {key: value for key, value in model.recipe.items() if key != "calibration"}


def fine_tune(
    job: Job,
    options: Mapping[str, Any],
    loggers: list[Logger],
    timer: EpochTimer,
    model: Method,
    data: TensorData,
) -> Method:
    """Fine-tune the network with fake quantization.

    Returns:
        The quantized model before the fine-tuning.
    """
    callbacks = [timer, *quantization_callbacks(options)]
    trainer = make_trainer(job, loggers, callbacks, validate=data.val is not None)
    model = prepare_fine_tuning(options, model, data)
    start = deepcopy(model)
    with prefixed("quant"):
        quantize_module(start, QuantSpec.from_config(options))
    fit(job, trainer, model, data)
    return start


def fine_tune_control(
    job: Job, options: Mapping[str, Any], model: Method, data: TensorData
) -> Method:
    """Fine-tune the network alike but without rounding, in the folder `finetuned` of the job.

    Its difference from the float network is due to the training alone, and that of int8 from it is
    due to the integers. It becomes control.ckpt, since patterns of checkpoints shall not match it.

    Returns:
        The fine-tuned model, in float.
    """
    folder = job.folder / CONTROL
    folder.mkdir(exist_ok=True)
    path = folder / "control.ckpt"
    if not path.exists():  # otherwise a resumed job has trained it before
        say(f"fine-tuning without rounding, in {folder}")
        callbacks = quantization_callbacks(options, rounds=False)
        trainer = make_trainer(job, [], callbacks, data.val is not None, folder)
        fit(job, trainer, prepare_fine_tuning(options, model, data), data, folder)
        (folder / "checkpoint.ckpt").rename(path)
    return load(path, "unquantized", trust=job.config["trust"])


def prepare_fine_tuning(options: Mapping[str, Any], model: Method, data: TensorData) -> Method:
    """Return the method that fine-tunes a trained one, and give the data its order of rows."""
    tuning = options["fine_tuning"]
    model = model.fine_tuning(fine_tuning_optimizer(options), tuning["prior_weight"])
    if tuning["imitate"]:
        assert isinstance(model, MemberTraining)
        model.imitate_members()
    data.order = Stream.FINE_TUNING_ORDER
    if tuning["seed"] is not None:  # for batches and noise; validation rows are unchanged
        model.seed = data.seed = tuning["seed"]
    return model


def calibrate(
    job: Job, options: Mapping[str, Any], loggers: list[Logger], model: Method, data: TensorData
) -> Method:
    """Quantize the network by calibration on a few batches, without training, and return it."""
    trainer = make_trainer(job, loggers, [], validate=data.val is not None)
    batches = options["fine_tuning"]["calibration_batches"]
    with prefixed("quant"):
        calibrate_module(model, QuantSpec.from_config(options), data, batches)
    save_checkpoint(trainer, model, job.folder / "checkpoint.ckpt")
    return model


def write_results(
    job: Job,
    loggers: list[Logger],
    data: TensorData,
    start: Method,
    models: Mapping[str, Method],
    test: Prediction,
    metrics: Mapping[str, float],
) -> list[str | Path]:
    """Write and log metrics, predictions, layers and figures, and return the expected files."""
    write_metrics(job.folder, metrics)
    write_predictions(job.folder, test)
    layers, size = write_layers(job.folder, start, models["simulated"], models["int8"], data)
    log_final(loggers, {**metrics, **{f"size/{name}": count for name, count in size.items()}})
    log_layers(loggers, layers)
    log_uncertain(loggers, data, test)
    expected: list[str | Path] = [*FILES]
    if job.config["quant"]["mode"] == "qat" and job.config["trainer"]["save_best"]:
        expected.append("best.ckpt")
    if has_budget(job.config["quant"]):
        expected.append("sensitivity.csv")
    if job.config["plots"]:
        figures = draw_results(job.folder, models["int8"], data, test)
        figures += draw_weights(job.folder, models["simulated"])
        log_figures(loggers, figures)
        expected += figures
    return expected
