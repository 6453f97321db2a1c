"""What a finished run leaves in its folder: metrics.json, predictions.npz, pictures, a table."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from bqnn.data import Rows, SyntheticData, TensorData
from bqnn.files import write_csv, write_json, written_beside
from bqnn.inference.likelihoods import Regression, as_they_are
from bqnn.layers.ensemble import Ensemble
from bqnn.methods import Method
from bqnn.methods.base import channels_last
from bqnn.plots import figures as plots
from bqnn.quant.summary import (
    Disagreement,
    disagreements,
    layer_rows,
    simulated_layers,
    sizes,
    warn_of_differences,
    weight_integers,
)

STAGES = ("float", "unquantized", "simulated", "int8")
TABLE = ("error", "nll", "ape", "mi", "ece", "rmse")
MAX_PREDICTION_BYTES = 32 * 2**20
_WHY_MISSING = {
    "best.ckpt": "no epoch was validated while it trained; lower trainer.check_val_every_n_epoch, "
    "or leave trainer.save_best out",
}


@dataclass(frozen=True, eq=False)
class Predictions:
    """Draws of the outputs for a set of rows, [S, N, ...], and the rows' targets [N].

    As the network gives and reads them: logits and classes, or means and log variances and
    targets, both standardized.
    """

    samples: Tensor
    targets: Tensor


def evaluate(
    model: Method,
    rows: Rows,
    data: TensorData,
    num_samples: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Predictions, dict[str, float]]:
    """Predict all rows, in as many draws as asked for or as the method makes, and score them.

    A metric that is not finite is given as it is, for `require_results` to name it at the end.
    """
    (samples,) = model.predictive_sets([rows.inputs], data.normalize, num_samples, progress)
    metrics = as_they_are(model.likelihood.metrics, samples, rows.targets)
    return Predictions(samples, rows.targets), metrics


class Evaluation(pl.Callback):
    """Keeps the predictions of the evaluation that the Trainer runs."""

    def __init__(self) -> None:
        self._batches: list[dict[str, Tensor]] = []

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches = []

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._batches.append({name: value.cpu() for name, value in outputs.items()})

    @property
    def predictions(self) -> Predictions:
        """Those of all test rows."""
        samples = torch.cat([batch["samples"] for batch in self._batches], dim=1)
        return Predictions(samples, torch.cat([batch["targets"] for batch in self._batches]))


def write_metrics(folder: Path, metrics: dict[str, float]) -> None:
    """metrics.json: a flat object of those that are finite; `require_results` names the others."""
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    write_json(folder / "metrics.json", finite)


def require_results(
    folder: Path, metrics: Mapping[str, float], files: Iterable[str | Path]
) -> None:
    """The last step of a job: what it promised is there.

    Args:
        folder: The job's.
        metrics: All of its metrics, which have to be finite.
        files: Those that the job was to write into the folder, or their paths.

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


def write_predictions(folder: Path, predictions: Predictions) -> None:
    """predictions.npz: `targets` [N] and `samples` [S, N, ...], as the network gives them.

    Where the samples take more than 32 MiB, `mean` [N, ...] is there instead: the mean of the
    class probabilities, or of the predicted mean and log variance.
    """
    samples, targets = predictions.samples.float(), predictions.targets
    if samples.numel() * samples.element_size() <= MAX_PREDICTION_BYTES:
        arrays = {"samples": samples.numpy()}
    else:
        is_logits = not targets.is_floating_point()
        values = samples.softmax(-1) if is_logits else samples.double()  # their sum may overflow
        arrays = {"mean": values.mean(0).float().numpy()}
    with written_beside(folder / "predictions.npz") as beside, beside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, targets=targets.numpy(), **arrays)


def draw_pictures(
    folder: Path, model: Method, data: TensorData, predictions: Predictions
) -> list[Path]:
    """Curves, if there was a training, and how well calibrated the predictions are: the paths."""
    figures = {}
    if _has_rows(folder / "metrics.csv"):
        figures["curves"] = plots.curves(folder / "metrics.csv")
    summary, targets = model.likelihood.summary(predictions.samples), predictions.targets
    if isinstance(model.likelihood, Regression):
        original = model.likelihood.target_mean + model.likelihood.target_std * targets.double()
        figures["interval_calibration"] = plots.interval_calibration(
            summary["mean"], summary["std"], original
        )
        figures["fit"] = plots.regression_fit(summary["mean"], summary["std"], original)
    else:
        figures["reliability"] = plots.reliability_diagram(summary["probabilities"], targets)
        figures["confidence"] = plots.confidence_histogram(summary["probabilities"], targets)
    if isinstance(data, SyntheticData):
        figures["fit"] = _synthetic_fit(model, data)
    return [plots.save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def write_layers(
    folder: Path, start: Method, simulated: Method, integer: Method, data: TensorData
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """quantization.csv, a row per quantized tensor, and size.json, the bytes of the parameters.

    start: the quantized model before any fine-tuning. Returns what the two files hold. Where int8
    differs from the simulation on the first test rows, a warning says so.
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


def draw_weights(folder: Path, simulated: Method) -> list[Path]:
    """weights.png: a histogram of each layer's weights, and the integers that they become.

    Of an ensemble, those of one member.
    """
    net = simulated.net
    if isinstance(net, Ensemble):
        net = net.members[0] if len(net.members) else net.current
    panels = [
        (f"{name} {weights.name}".strip(), weights.steps, weights.values)
        for name, layer in simulated_layers(net)
        for weights in weight_integers(layer)
    ]
    return [plots.save(plots.weight_grids(panels), folder / "weights.png")]


def comparison_table(metrics: Mapping[str, float]) -> str:
    """Float, unquantized, simulated and int8 side by side, and what made the difference."""
    names = [n for n in TABLE if f"float/test/{n}" in metrics]
    head = (*STAGES, "fine-tuning", "quantization")
    lines = [f"{'test':<6}" + "".join(f"{title:>14}" for title in head)]
    for name in names:
        cells = [metrics[f"{stage}/test/{name}"] for stage in STAGES]
        changes = (cells[1] - cells[0], cells[3] - cells[1])
        lines.append(
            f"{name:<6}"
            + "".join(f"{_number(cell):>14}" for cell in cells)
            + "".join(f"{_number(change, '+'):>14}" for change in changes)
        )
    return "\n".join(lines)


def table(metrics: dict[str, float], splits: Sequence[str]) -> str:
    """The metrics of each split side by side, as text for a terminal."""
    names = [name.removeprefix("test/") for name in metrics if name.startswith("test/")]
    cells = {name: [metrics.get(f"{split}/{name}") for split in splits] for name in names}
    return text_table(splits, cells, first=20, others=12)


def text_table(
    head: Sequence[str], cells: Mapping[str, Sequence[float | None]], first: int, others: int
) -> str:
    """Named lines of numbers below a head; `first` and `others` are the columns' widths."""
    lines = [f"{'':<{first}}" + "".join(f"{title:>{others}}" for title in head)]
    for name, numbers in cells.items():
        texts = ("" if x is None else _number(x) for x in numbers)
        lines.append(f"{name:<{first}}" + "".join(f"{text:>{others}}" for text in texts))
    return "\n".join(lines)


def _number(value: float, sign: str = "") -> str:
    """The number in at most 12 characters."""
    return f"{value:{sign}.4f}" if abs(value) < 1e6 else f"{value:{sign}.3e}"


def _has_rows(path: Path) -> bool:
    """Whether a CSV file exists and has more lines than its head."""
    if not path.exists():
        return False
    with path.open() as file:
        return sum(1 for _ in islice(file, 2)) == 2


def _synthetic_fit(model: Method, data: SyntheticData) -> Any:
    grid = data.grid()
    truth_mean, truth_std = data.truth(grid[:, 0])
    with torch.no_grad():
        samples = model.eval().predictive(data.standardize(grid).to(model.device)).cpu()
    train = data.train
    x = train.inputs[:, 0] * data.input_std[0] + data.input_mean[0]
    y = train.targets * data.target_std + data.target_mean
    summary = model.likelihood.summary(samples)
    return plots.synthetic_fit(grid[:, 0], summary, truth_mean, truth_std, x, y)
