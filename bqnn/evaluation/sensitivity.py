"""Measure what a network loses when one of its tensors has fewer bits and all others have 8."""

import csv
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bqnn.evaluation.suite import EvaluationSet, predict_sets
from bqnn.files import write_csv
from bqnn.inference.predictions import Prediction, score, with_non_finite
from bqnn.inference.ranking import AUROC
from bqnn.methods import Method
from bqnn.quant.budget import FULL, Row
from bqnn.quant.sensitivity import QuantizedTensor
from bqnn.quant.spec import QuantSpec
from bqnn.quant.summary import sizes

log = logging.getLogger(__name__)

OTHER = "other"  # the set that AUROC tells from the validation rows

Measure = Callable[[Method], Mapping[str, Any]]


def measures(
    original: Method,
    sets: Mapping[str, EvaluationSet],
    normalize: Callable[[Tensor], Tensor],
    num_samples: int,
) -> Measure:
    """Return a function that measures a model: `nll`, `kl`, and `mi` and `auroc` if there are any.

    Args:
        original: The float model, from whose predictions `kl` is the divergence.
        sets: The validation rows as `val`, and another set as `other` if AUROC is measured.
        normalize: Converts raw inputs to inputs of the network.
        num_samples: The number of draws, which are the same for every model.
    """

    reference = predict_sets(original, {"val": sets["val"]}, normalize, num_samples)["val"]

    def measure(model: Method) -> dict[str, float]:
        predictions = predict_sets(model, sets, normalize, num_samples)
        found = with_non_finite(score, predictions["val"])
        metrics = {name: value for name, value in found.items() if name in ("nll", "mi")}
        metrics["kl"] = divergence(reference, predictions["val"])
        if OTHER in predictions:
            metrics["auroc"] = _auroc(predictions["val"], predictions[OTHER])
        return metrics

    return measure


def divergence(reference: Prediction, prediction: Prediction) -> float:
    """Return the mean KL divergence of a prediction from a reference, in nats per row.

    In a regression, it is that of Gaussians with the mean and the variance of the prediction.

    Examples:
        >>> from bqnn.inference.likelihoods import Classification
        >>> both = [
        ...     Prediction(Classification(["cat", "dog"]), torch.tensor([[[0.0, logit]]]))
        ...     for logit in (0.0, 1.0)
        ... ]
        >>> divergence(both[0], both[0]), round(divergence(*both), 4)
        (0.0, 0.1201)
    """
    p, q = reference.summary, prediction.summary
    if "probabilities" in p:
        known, found = p["probabilities"].double(), q["probabilities"].double().clamp_min(1e-300)
        return (torch.xlogy(known, known) - torch.xlogy(known, found)).sum(-1).mean().item()
    ratio = p["std"] / q["std"]
    shift = (p["mean"] - q["mean"]) / q["std"]
    return ((ratio.square() + shift.square() - 1) / 2 - ratio.log()).mean().item()


def unmeasured(
    calibrated: Method, tensors: Sequence[QuantizedTensor], widths: Sequence[int]
) -> list[Row]:
    """Return the rows of `sensitivity` with an NLL of 0, and that of the float network.

    Args:
        calibrated: The model.
        tensors: Tensors of its network.
        widths: The widths.
    """
    rows = [
        Row(each.layer, each.tensor, bits, each.values, each.packed_bytes(bits), 0.0)
        for each in tensors
        for bits in sorted({FULL, *widths}, reverse=True)
    ]
    values, size = sum(each.values for each in tensors), sizes(calibrated.net)
    rows.append(Row("", "all", FULL, values, size["packed_bytes"], 0.0))
    return [*rows, Row("", "float", 32, values, size["float_bytes"], 0.0)]


def sensitivity(
    original: Method,
    calibrated: Method,
    tensors: Sequence[QuantizedTensor],
    rows: Sequence[Row],
    spec: QuantSpec,
    measure: Measure,
) -> Iterator[Row]:
    """Measure a model with each tensor at each width and all others at 8 bits.

    Args:
        original: The float model.
        calibrated: The model, calibrated with 8 bits for each of these tensors.
        tensors: The tensors.
        rows: The rows from `unmeasured`.
        spec: The spec of the calibration.
        measure: The function from `measures`.

    Yields:
        The rows with their measurements. That with all tensors at 8 bits is also that of each
        tensor at 8 bits.
    """
    by_key = {(each.layer, each.tensor): each for each in tensors}
    full = measure(calibrated)
    for number, row in enumerate(rows, start=1):
        found = full
        if row.tensor == "float":
            found = measure(original)
        elif row.bits != FULL:
            log.info("sensitivity %d/%d: %s %s", number, len(rows), row.layer, row.tensor)
            with by_key[row.layer, row.tensor].at(row.bits, spec):
                found = measure(calibrated)
        yield replace(row, **found)


def write_sensitivity(path: Path, rows: Sequence[Row]) -> None:
    """Write sensitivity.csv: a row for each measurement; what was not measured is empty."""
    write_csv(path, [asdict(row) for row in rows])


def read_sensitivity(path: Path, widths: Sequence[int]) -> list[Row] | None:
    """Read sensitivity.csv.

    Args:
        path: The file.
        widths: The widths that are needed.

    Returns:
        The rows, or None if they are not what `write_sensitivity` wrote for these widths.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [_row(cells) for cells in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return None
    found: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        found.setdefault((row.layer, row.tensor), set()).add(row.bits)
    is_whole = [*found][-2:] == [("", "all"), ("", "float")]  # the last ones to be written
    if is_whole and all(of >= {FULL, *widths} for key, of in found.items() if key[0]):
        return rows
    return None


def _row(cells: Mapping[str, str]) -> Row:
    bits, values, size = (int(cells[name]) for name in ("bits", "values", "bytes"))
    mi, auroc = (float(cells[name]) if cells[name] else None for name in ("mi", "auroc"))
    nll = float(cells["nll"])
    return Row(
        cells["layer"], cells["tensor"], bits, values, size, nll, mi, auroc, float(cells["kl"])
    )


def _auroc(familiar: Prediction, unfamiliar: Prediction) -> float:
    """Measure how well the main score of uncertainty tells two sets apart."""
    known, unknown = (
        next(iter(each.likelihood.scores(each.summary).values())) for each in (familiar, unfamiliar)
    )
    metric, both = AUROC(sync_on_compute=False), torch.cat([known, unknown])
    metric.update(both, torch.arange(len(both)) >= len(known))
    return metric.compute().item()
