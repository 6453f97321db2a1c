"""Files of results in a job's folder: metrics, predictions, curves and layers."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bqnn.data import TensorData
from bqnn.data.distortions import DISTORTIONS
from bqnn.evaluation.suite import Findings, distortions_in
from bqnn.files import write_csv, write_json, written_beside
from bqnn.inference.predictions import Prediction
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
    "or leave trainer.save_best out",
}


def write_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Write metrics.json: a flat object of the finite metrics; `require_results` names others."""
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    write_json(folder / "metrics.json", finite)


def require_results(
    folder: Path, metrics: Mapping[str, float], files: Iterable[str | Path]
) -> None:
    """Check that a job has written what it promised. It is the last step of a job.

    Args:
        folder: The job's folder.
        metrics: All metrics of the job, which have to be finite.
        files: Names or paths of the files that the job was to write into the folder.

    Raises:
        FileNotFoundError: A file is missing, as best.ckpt is where no epoch was validated.
        ValueError: A metric is infinite or NaN. metrics.json has the others.
    """
    for file in map(Path, files):
        if not (folder / file).exists():
            why = _WHY_MISSING.get(file.name, "something else has removed it")
            raise FileNotFoundError(f"{file.name} is missing: {why}; other results are in {folder}")
    spoilt = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if spoilt:
        raise ValueError(
            f"{', '.join(spoilt)}: a row lies so far from the training rows that its error or its "
            "predicted variance leaves the range of float64; look at that row. metrics.json has "
            "all other metrics"
        )


def write_predictions(folder: Path, prediction: Prediction) -> None:
    """Write predictions.npz: `targets` [N] and `samples` [S, N, ...], as the network gives them.

    Where the samples take more than 32 MiB, `mean` [N, ...] replaces them: the mean of the class
    probabilities, or of the predicted mean and log variance.
    """
    samples, targets = prediction.samples.float(), prediction.targets
    assert targets is not None
    if samples.numel() * samples.element_size() <= MAX_PREDICTION_BYTES:
        arrays = {"samples": samples.numpy()}
    else:
        is_logits = not targets.is_floating_point()
        values = samples.softmax(-1) if is_logits else samples.double()  # their sum may overflow
        arrays = {"mean": values.mean(0).float().numpy()}
    _write_arrays(folder / "predictions.npz", {"targets": targets.numpy(), **arrays})


def write_uncertainty(folder: Path, predictions: Mapping[str, Prediction]) -> None:
    """Write uncertainty.npz: what is predicted for each row of each set, and how sure it is.

    For each set, `<set>/targets` where it has any, and everything in `Likelihood.summary`: class
    probabilities (float32), entropy and its parts, or a mean and its standard deviations
    (float64, whose range original units may need).
    """
    arrays = {}
    for name, each in predictions.items():
        if each.targets is not None:
            arrays[f"{name}/targets"] = each.targets.numpy()
        for key, values in each.summary.items():
            arrays[f"{name}/{key}"] = (values.float() if values.dim() > 1 else values).numpy()
    _write_arrays(folder / "uncertainty.npz", arrays)


def write_curves(folder: Path, findings: Findings) -> None:
    """Write shift_<distortion>.csv, risk_coverage.csv, and convergence.csv if there are steps."""
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


def level_rows(metrics: Mapping[str, float], distortion: str) -> list[dict[str, float]]:
    """List every metric of the test images (level 0), and of each level of a distortion.

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
    """Write quantization.csv, a row per quantized tensor, and size.json, bytes of parameters.

    A warning is logged where int8 differs from the simulation on the first test rows.

    Args:
        folder: The job's folder.
        start: The quantized model before any fine-tuning.
        simulated: The model with fake quantization.
        integer: The model that runs in integers.
        data: The data set that the models are compared on.

    Returns:
        What the two files hold.
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
