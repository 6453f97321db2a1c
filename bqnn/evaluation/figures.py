"""Figures of results in a job's folder."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bqnn.data import SyntheticData, TensorData
from bqnn.evaluation.results import level_rows
from bqnn.evaluation.suite import Findings, distortions_in
from bqnn.inference.likelihoods import Regression
from bqnn.inference.predictions import Prediction
from bqnn.layers.ensemble import Ensemble
from bqnn.methods import Method
from bqnn.plots import figures as plots
from bqnn.quant.budget import Bits, Row, losses
from bqnn.quant.summary import simulated_layers, weight_integers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_results(
    folder: Path, model: Method, data: TensorData, prediction: Prediction
) -> list[Path]:
    """Draw the learning curves of a training, and the calibration of a prediction.

    Args:
        folder: The folder of the job. The curves are in its metrics.csv, if there is one.
        model: The model, which is used to predict a grid of inputs of synthetic data.
        data: The data set.
        prediction: The prediction of the test rows.

    Returns:
        The paths of the figures.
    """
    figures = {}
    if _has_rows(folder / "metrics.csv"):
        figures["curves"] = plots.curves(folder / "metrics.csv")
    likelihood, summary, targets = prediction.likelihood, prediction.summary, prediction.targets
    assert targets is not None
    if isinstance(likelihood, Regression):
        original = likelihood.target_mean + likelihood.target_std * targets.double()
        figures["interval_calibration"] = plots.interval_calibration(
            summary["mean"], summary["std"], original
        )
        figures["fit"] = plots.regression_fit(summary["mean"], summary["std"], original)
    else:
        figures["reliability"] = plots.reliability_diagram(summary["probabilities"], targets)
        figures["confidence"] = plots.confidence_histogram(summary["probabilities"], targets)
    if isinstance(data, SyntheticData):
        figures["fit"] = _synthetic_fit(model, data)
    return _save(folder, figures)


def draw_weights(folder: Path, simulated: Method) -> list[Path]:
    """Draw a histogram of the weights of each layer and of their integers.

    Args:
        folder: The folder of the job.
        simulated: The model with fake quantization. For an ensemble, one member is drawn.

    Returns:
        The path of weights.png.
    """
    net = simulated.net
    if isinstance(net, Ensemble):
        net = net.members[0] if len(net.members) else net.current
    panels = [
        (f"{name} {weights.name}".strip(), weights.steps, weights.values)
        for name, layer in simulated_layers(net)
        for weights in weight_integers(layer)
    ]
    return _save(folder, {"weights": plots.weight_grids(panels)})


def draw_sensitivity(folder: Path, rows: Sequence[Row], bits: Bits, measure: str) -> list[Path]:
    """Draw the loss of each tensor at each width, and the chosen widths.

    Args:
        folder: The folder of the job.
        rows: The rows of sensitivity.csv.
        bits: The chosen widths.
        measure: The measure of the budget.

    Returns:
        The path of sensitivity.png.
    """
    found = {f"{layer} {tensor}": of for (layer, tensor), of in losses(rows, measure).items()}
    chosen = {f"{layer} {tensor}": width for (layer, tensor), width in bits.items()}
    words = {
        "nll": "added NLL, nats",
        "kl": "added divergence from float, nats",
        "mi": "added distance of MI from float, nats",
        "auroc": "lost AUROC",
    }
    return _save(folder, {"sensitivity": plots.sensitivity(found, chosen, words[measure])})


def draw_suite(folder: Path, findings: Findings) -> list[Path]:
    """Draw risk against coverage, and shift, ood and convergence if the suite has them.

    Args:
        folder: The folder of the job.
        findings: The findings of the suite.

    Returns:
        The paths of the figures.
    """
    predictions, steps = findings.predictions, findings.steps
    is_regression = isinstance(predictions["test"].likelihood, Regression)
    risk = "mean squared error of kept rows" if is_regression else "error of kept rows"
    figures = {"risk_coverage": plots.risk_coverage(findings.risk, risk)}
    if distortions_in(predictions):
        figures["shift"] = _shift(findings)
    if any(name.startswith("ood/") for name in predictions):
        figures["ood"] = _score_histograms(predictions)
    if steps:
        lines = {
            name: {"test": [(count, step[name]) for count, step in enumerate(steps, 1)]}
            for name in steps[0]
        }
        figures["convergence"] = plots.panels(lines, "draws")
    return _save(folder, figures)


def _shift(findings: Findings) -> "Figure":
    """Draw every metric against the level of each distortion."""
    metrics = findings.metrics
    shifted = {name: level_rows(metrics, name) for name in distortions_in(findings.predictions)}
    names = [key.removeprefix("test/") for key in metrics if key.startswith("test/")]
    lines = {
        name: {kind: [(row["level"], row[name]) for row in rows] for kind, rows in shifted.items()}
        for name in names
    }
    return plots.panels(lines, "level of distortion")


def _score_histograms(predictions: Mapping[str, Prediction]) -> "Figure":
    """Draw the main uncertainty score on the test set and on out-of-distribution sets."""
    groups = {}
    for name, each in predictions.items():
        if name == "test" or name.startswith("ood/"):
            scores = each.likelihood.scores(each.summary)
            main = next(iter(scores))
            groups[name] = scores[main]
    return plots.score_histograms(groups, main)


def _synthetic_fit(model: Method, data: SyntheticData) -> "Figure":
    grid = data.grid()
    truth_mean, truth_std = data.truth(grid[:, 0])
    with torch.no_grad():
        samples = model.eval().predictive(data.standardize(grid).to(model.device)).cpu()
    train = data.train
    x = train.inputs[:, 0] * data.input_std[0] + data.input_mean[0]
    y = train.targets * data.target_std + data.target_mean
    summary = model.likelihood.summary(samples)
    return plots.synthetic_fit(grid[:, 0], summary, truth_mean, truth_std, x, y)


def _has_rows(path: Path) -> bool:
    """Return whether a CSV file exists and has rows below its header."""
    if not path.exists():
        return False
    with path.open() as file:
        return sum(1 for _ in islice(file, 2)) == 2


def _save(folder: Path, figures: "Mapping[str, Figure]") -> list[Path]:
    return [plots.save(figure, folder / f"{name}.png") for name, figure in figures.items()]
