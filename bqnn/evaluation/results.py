"""Write the results of a job: metrics, predictions, curves and layers."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bqnn.data import TensorData
from bqnn.data.distortions import DISTORTIONS
from bqnn.evaluation.suite import Findings, distortions_in
from bqnn.files import write_csv, write_json, written_beside
from bqnn.inference.calibration import Calibration
from bqnn.inference.predictions import Prediction, score, with_non_finite
from bqnn.layers.ensemble import Ensemble
from bqnn.methods import Method
from bqnn.methods.base import channels_last
from bqnn.quant.summary import (
    Disagreement,
    disagreements,
    layer_rows,
    sizes,
    warn_of_differences,
)

MAX_PREDICTION_BYTES = 32 * 2**20
_WHY_MISSING = {
    "best.ckpt": "no epoch was validated while it trained; lower trainer.check_val_every_n_epoch, "
    "or omit trainer.save_best",
}


def write_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Write the finite metrics to metrics.json. `require_results` reports the others."""
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    write_json(folder / "metrics.json", finite)


def require_results(
    folder: Path, metrics: Mapping[str, float], files: Iterable[str | Path]
) -> None:
    """Check that the results of a job are complete and finite. This is the last step of a job.

    Args:
        folder: The folder of the job.
        metrics: All metrics of the job.
        files: Names or paths of the files that the folder must have.

    Raises:
        FileNotFoundError: A file is missing. best.ckpt is if no epoch was validated.
        ValueError: A metric is infinite or NaN.

    Examples:
        >>> nll = float("nan")
        >>> require_results(Path("."), {"test/nll": nll}, [])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: test/nll is nan: a row is so far from ...
    """
    for file in map(Path, files):
        if not (folder / file).exists():
            why = _WHY_MISSING.get(file.name, "another process deleted it; run the job again")
            raise FileNotFoundError(f"{file.name} is missing: {why}; other results are in {folder}")
    spoilt = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if spoilt:
        raise ValueError(
            f"{', '.join(spoilt)}: a row is so far from the training rows that its error or its "
            "predicted variance leaves the range of float64; inspect that row. metrics.json has "
            "all other metrics"
        )


def write_predictions(folder: Path, prediction: Prediction) -> None:
    """Write predictions.npz: `targets` [N] and `samples` [S, N, ...], the outputs of the network.

    If the samples take more than 32 MiB, `mean` [N, ...] replaces them: the mean over the draws of
    the class probabilities, or of the predicted mean and log variance. After an early stop,
    `num_samples` [N] has the number of draws of each row, and its other samples are NaN.
    """
    samples, targets = prediction.samples.float(), prediction.targets
    assert targets is not None
    if samples.numel() * samples.element_size() <= MAX_PREDICTION_BYTES:
        arrays = {"samples": samples.numpy()}
    else:
        is_logits = not targets.is_floating_point()
        values = samples.softmax(-1) if is_logits else samples.double()  # float32 may overflow
        mean = values.mean(0) if prediction.num_samples is None else values.nanmean(0)
        arrays = {"mean": mean.float().numpy()}
    if prediction.num_samples is not None:
        arrays["num_samples"] = prediction.num_samples.numpy()
    _write_arrays(folder / "predictions.npz", {"targets": targets.numpy(), **arrays})


def write_uncertainty(folder: Path, predictions: Mapping[str, Prediction]) -> None:
    """Write uncertainty.npz: the prediction and the uncertainty of each row of each set.

    For each set, the file has `<set>/targets` if there are targets, `<set>/num_samples` after an
    early stop, and all of `Likelihood.summary`: class probabilities (float32), entropy and its
    parts, or a mean and its standard deviations (float64, because original units can exceed the
    range of float32).
    """
    arrays = {}
    for name, each in predictions.items():
        if each.targets is not None:
            arrays[f"{name}/targets"] = each.targets.numpy()
        if each.num_samples is not None:
            arrays[f"{name}/num_samples"] = each.num_samples.numpy()
        for key, values in each.summary.items():
            arrays[f"{name}/{key}"] = (values.float() if values.dim() > 1 else values).numpy()
    _write_arrays(folder / "uncertainty.npz", arrays)


def write_calibration(folder: Path, calibration: Calibration, validation: Prediction) -> None:
    """Write calibration.json: the calibration, its validation rows, and their NLL in both states.

    Args:
        folder: The folder of the job.
        calibration: The calibration.
        validation: The prediction of the rows that it was fitted on, before the calibration.
    """
    before, after = (
        with_non_finite(score, each)["nll"]
        for each in (validation, validation.calibrated(calibration))
    )
    record = {
        **calibration.to_dict(),
        "validation_rows": validation.samples.shape[1],
        "validation_nll_before": before,
        "validation_nll_after": after,
    }
    write_json(folder / "calibration.json", record)


def write_curves(folder: Path, findings: Findings) -> None:
    """Write shift_<distortion>.csv and risk_coverage.csv.

    Also write convergence.csv and conformal.csv, if the findings have them.
    """
    for distortion in distortions_in(findings.predictions):
        write_csv(folder / f"shift_{distortion}.csv", level_rows(findings.metrics, distortion))
    num_rows = len(next(iter(findings.risk.values())))
    columns = {"coverage": np.arange(1, num_rows + 1) / num_rows}
    columns |= {f"risk_{score}": risk.numpy() for score, risk in findings.risk.items()}
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    write_csv(folder / "risk_coverage.csv", [dict(zip(columns, r, strict=True)) for r in rows])
    if findings.steps:
        steps = [{"num_samples": count, **step} for count, step in enumerate(findings.steps, 1)]
        write_csv(folder / "convergence.csv", steps)
    if findings.conformal:
        write_csv(folder / "conformal.csv", findings.conformal)


def level_rows(metrics: Mapping[str, float], distortion: str) -> list[dict[str, float]]:
    """List the metrics at each level of a distortion. Level 0 is the test set.

    Args:
        metrics: Metrics under keys such as test/nll and shift/rotation_1/nll.
        distortion: The name of the distortion.

    Returns:
        A row per level: `level`, `amount` and the metrics.
    """
    names = [key.removeprefix("test/") for key in metrics if key.startswith("test/")]
    rows = []
    kind = DISTORTIONS[distortion]
    for level, amount in enumerate((kind.nothing, *kind.amounts)):
        at = f"shift/{distortion}_{level}" if level > 0 else "test"
        rows.append({"level": level, "amount": amount, **{n: metrics[f"{at}/{n}"] for n in names}})
    return rows


def write_layers(
    folder: Path, start: Method, simulated: Method, integer: Method, data: TensorData
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Write quantization.csv (a row per quantized tensor) and size.json (bytes of parameters).

    Logs a warning if int8 differs from the simulation on the first test rows.

    Args:
        folder: The folder of the job.
        start: The quantized model before fine-tuning.
        simulated: The model with fake quantization.
        integer: The model that runs in integers.
        data: The data set on which the models are compared.

    Returns:
        The content of the two files.
    """
    x = channels_last(data.normalize(data.test.inputs[:256]))
    found: dict[str, Disagreement] = {}
    for index in range(len(simulated.net) if isinstance(simulated.net, Ensemble) else 1):
        found |= disagreements(simulated.net, integer.net, x, index)
    warn_of_differences(found)
    rows, size = layer_rows(simulated.net, start.net, found), sizes(simulated.net)
    write_csv(folder / "quantization.csv", rows)
    write_json(folder / "size.json", size)
    return rows, size


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with written_beside(path) as beside, beside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
