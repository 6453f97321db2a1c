"""What a finished run leaves in its folder: metrics.json, predictions.npz, pictures, a table."""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from bqnn import plots
from bqnn.data import SyntheticData, TensorData
from bqnn.files import write_json, written_beside
from bqnn.likelihoods import Regression
from bqnn.methods import Method

MAX_PREDICTION_BYTES = 32 * 2**20


class Evaluation(pl.Callback):
    """Keeps the draws and targets of the evaluation that the Trainer runs."""

    def __init__(self) -> None:
        self._batches: list[dict[str, Tensor]] = []

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches = []

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._batches.append({name: value.cpu() for name, value in outputs.items()})

    @property
    def samples(self) -> Tensor:
        """Draws of the outputs for all test rows: [S, N, ...]."""
        return torch.cat([batch["samples"] for batch in self._batches], dim=1)

    @property
    def targets(self) -> Tensor:
        """[N], standardized for regression."""
        return torch.cat([batch["targets"] for batch in self._batches])


def write_metrics(folder: Path, metrics: dict[str, float]) -> None:
    """metrics.json: a flat object of finite numbers."""
    write_json(folder / "metrics.json", {name: float(value) for name, value in metrics.items()})


def write_predictions(folder: Path, evaluation: Evaluation) -> None:
    """predictions.npz: `targets` [N] and `samples` [S, N, ...], as the network gives them.

    Where the samples take more than 32 MiB, `mean` [N, ...] is there instead: the mean of the
    class probabilities, or of the predicted mean and log variance.
    """
    samples, targets = evaluation.samples.float(), evaluation.targets
    if samples.numel() * samples.element_size() <= MAX_PREDICTION_BYTES:
        arrays = {"samples": samples.numpy()}
    else:
        is_logits = not targets.is_floating_point()
        arrays = {"mean": (samples.softmax(-1) if is_logits else samples).mean(0).numpy()}
    with written_beside(folder / "predictions.npz") as beside, beside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, targets=targets.numpy(), **arrays)


def draw_pictures(
    folder: Path, model: Method, data: TensorData, evaluation: Evaluation
) -> list[Path]:
    """Curves, and how well calibrated the predictions are; returns the paths of the pictures."""
    figures = {"curves": plots.curves(folder / "metrics.csv")}
    summary, targets = model.likelihood.summary(evaluation.samples), evaluation.targets
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


def table(metrics: dict[str, float], splits: tuple[str, ...] = ("val", "test")) -> str:
    """The metrics of each split side by side, as text for a terminal."""
    names = [name.partition("/")[2] for name in metrics if name.startswith("test/")]
    lines = [f"{'':<20}" + "".join(f"{split:>12}" for split in splits)]
    for name in names:
        cells = (metrics.get(f"{split}/{name}") for split in splits)
        lines.append(
            f"{name:<20}" + "".join(f"{'' if x is None else format(x, '.4f'):>12}" for x in cells)
        )
    return "\n".join(lines)


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
