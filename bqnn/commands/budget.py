"""The step of quantize.py that chooses the bits of each layer within `quant.budget`."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from pytorch_lightning.loggers import Logger

from bqnn.arguments import prefixed
from bqnn.data import TensorData
from bqnn.data.ood import ood_sets
from bqnn.evaluation.figures import draw_sensitivity
from bqnn.evaluation.sensitivity import (
    OTHER,
    measures,
    read_sensitivity,
    sensitivity,
    unmeasured,
    write_sensitivity,
)
from bqnn.evaluation.suite import EvaluationSet, validation_set
from bqnn.inference.likelihoods import Classification
from bqnn.jobs.job import Job
from bqnn.jobs.terminal import say
from bqnn.methods import Method
from bqnn.methods.base import channels_last
from bqnn.quant.budget import FULL, OUTPUT, Bits, Budget, Row, choose_bits, overrides
from bqnn.quant.callback import calibrate_module
from bqnn.quant.sensitivity import activation_tensors, stored_tensors
from bqnn.quant.spec import QuantSpec
from bqnn.training.loggers import log_figures
from bqnn.training.process import find_device

MEANS = {"weights": "weight_bits", "activations": "activation_bits"}
LIMITS = ("bytes", "mean_bits", "mean_activation_bits")


def has_budget(quant: Mapping[str, Any]) -> bool:
    """Return whether the group `quant` of a configuration sets a limit of `quant.budget`."""
    return any(quant.get("budget", {}).get(name) is not None for name in LIMITS)


def check_budget(quant: Mapping[str, Any]) -> None:
    """Refuse options that have no effect with, or without, a budget.

    Raises:
        ValueError: An option contradicts the others.
    """
    budget = quant["budget"]
    if not has_budget(quant):
        for key, default in (("measure", "nll"), ("other", None)):
            if budget[key] != default:
                raise ValueError(
                    f"quant.budget.{key}={budget[key]}: there is no limit; set quant.budget.bytes, "
                    "quant.budget.mean_bits or quant.budget.mean_activation_bits"
                )
        return
    if budget["other"] is not None and budget["measure"] != "auroc":
        raise ValueError(
            f"quant.budget.other={budget['other']}: quant.budget.measure={budget['measure']} needs "
            "no other set; leave it out, or set quant.budget.measure=auroc"
        )
    has_weights = budget["bytes"] is not None or budget["mean_bits"] is not None
    for key, is_chosen in (("overrides", True), ("sigma_bits", has_weights)):
        if quant[key] and is_chosen:
            raise ValueError(
                f"quant.{key}: quant.budget chooses the bits of each layer; leave out one of the "
                "two"
            )


def within_budget(
    job: Job, loggers: list[Logger], model: Method, data: TensorData, num_samples: int
) -> dict[str, Any]:
    """Return the group `quant` of a job with the overrides that its budget chooses.

    The sensitivities are written to sensitivity.csv, which a resumed job reads.
    `weight_bits` and `activation_bits` become the rounded means.

    Args:
        job: The job.
        loggers: Its loggers, which get the figure of the sensitivities.
        model: The float model. It stays as it is.
        data: The data set.
        num_samples: The number of draws.

    Raises:
        ValueError: There are no validation rows, the measure does not suit the model, or a limit
            cannot be reached.
    """
    options: dict[str, Any] = job.config["quant"]
    if not has_budget(options):
        return options
    path = job.folder / "sensitivity.csv"
    rows = read_sensitivity(path, options["budget"]["widths"])
    if rows is None:  # otherwise an interrupted process has measured it
        rows = measure_sensitivity(job, model, data, num_samples)
        write_sensitivity(path, rows)
    bits = choose(rows, options["budget"])
    if job.config["plots"]:
        measure = options["budget"]["measure"]
        log_figures(loggers, draw_sensitivity(job.folder, rows, bits, measure))
    chosen = [row for row in rows if bits.get((row.layer, row.tensor)) == row.bits]
    say(described(chosen))
    means = {MEANS[name]: round(mean) for name, mean in mean_bits(chosen).items()}
    return {**options, **means, "overrides": overrides(bits)}


def measure_sensitivity(job: Job, model: Method, data: TensorData, num_samples: int) -> list[Row]:
    """Measure each tensor that a limit is on at each width, on validation rows.

    The model is calibrated with 8 bits and without training.

    Raises:
        ValueError: There are no validation rows, or the measure does not suit the model.
    """
    options: dict[str, Any] = job.config["quant"]
    budget = options["budget"]
    check_measure(budget["measure"], model, num_samples)
    sets = {"val": validation_set(data, "quant.budget")}
    if budget["measure"] == "auroc":
        sets[OTHER] = other_set(data, budget["other"])
    sets = {name: spread_rows(each, budget["rows"]) for name, each in sets.items()}
    spec = replace(
        QuantSpec.from_config({**options, "mode": "ptq", "activation_observer": None}),
        weight_bits=FULL,
        sigma_bits=FULL,
        activation_bits=FULL,
        engine="reference",  # so that the choice does not depend on the CPU
    )
    calibrated = deepcopy(model)
    with prefixed("quant"):
        calibrate_module(calibrated, spec, data, options["fine_tuning"]["calibration_batches"])
    tensors = []
    if budget["bytes"] is not None or budget["mean_bits"] is not None:
        tensors += stored_tensors(calibrated.net)
    if budget["mean_activation_bits"] is not None:
        row = channels_last(data.normalize(sets["val"].inputs[:1]))
        tensors += activation_tensors(calibrated.net, row)
    rows = unmeasured(calibrated, tensors, budget["widths"])
    choose(rows, {**budget, "measure": "nll"})  # refuses a limit that cannot be reached
    device = find_device(job.config["trainer"])
    model.to(device), calibrated.to(device)
    measure = measures(model, sets, data.normalize, num_samples)
    measured = [*sensitivity(model, calibrated, tensors, rows, spec, measure)]
    model.cpu()
    return measured


def choose(rows: Sequence[Row], budget: Mapping[str, Any]) -> Bits:
    """Choose the bits within the group `quant.budget` of a configuration.

    Raises:
        ValueError: A limit cannot be reached.
    """
    given = {name: budget[name] for name in (*LIMITS, "measure")}
    with prefixed("quant.budget"):
        return choose_bits(rows, Budget(**given, widths=tuple(budget["widths"])))


def check_measure(measure: str, model: Method, num_samples: int) -> None:
    """Refuse mutual information of a regression, and of a single draw.

    Raises:
        ValueError: The model has no mutual information.
    """
    if measure != "mi":
        return
    if not isinstance(model.likelihood, Classification):
        raise ValueError(
            "quant.budget.measure=mi: a regression has no mutual information; choose nll or auroc"
        )
    if num_samples == 1:
        raise ValueError(
            "quant.budget.measure=mi: one draw has no mutual information; choose nll or auroc, or "
            "a larger num_samples"
        )


def other_set(data: TensorData, name: str | None) -> EvaluationSet:
    """Return the set that AUROC tells from the validation rows: `name`, or the first of the task.

    Raises:
        ValueError: The task has no set of this name.
    """
    try:
        found = ood_sets(data, None if name is None else [name])
    except ValueError as error:
        raise ValueError(str(error).replace("suite.ood", "quant.budget.other")) from error
    return EvaluationSet(next(iter(found.values()))[0], None)


def spread_rows(each: EvaluationSet, most: int | None) -> EvaluationSet:
    """Return at most `most` rows of a set, at equal distances."""
    count = len(each.inputs)
    if most is None or count <= most:
        return each
    rows = torch.linspace(0, count - 1, most).round().long()
    return EvaluationSet(each.inputs[rows], None if each.targets is None else each.targets[rows])


def described(chosen: Sequence[Row]) -> str:
    """Return a table of the chosen rows, with a line for each layer."""
    lines: dict[str, str] = {}
    for row in chosen:
        lines[row.layer] = f"{lines.get(row.layer, '')}  {row.tensor} {row.bits}"
    width = max(map(len, lines))
    means = ", ".join(f"{name} {mean:.3f}" for name, mean in mean_bits(chosen).items())
    table = [f"  {layer:<{width}}{text}" for layer, text in lines.items()]
    return "\n".join([f"bits within quant.budget, means: {means}", *table])


def mean_bits(chosen: Sequence[Row]) -> dict[str, float]:
    """Return the mean bits of weights and of activations, as far as they were chosen."""
    means = {}
    for name in MEANS:
        of = [row for row in chosen if (row.tensor == OUTPUT) == (name == "activations")]
        if of:
            means[name] = sum(r.bits * r.values for r in of) / sum(r.values for r in of)
    return means
