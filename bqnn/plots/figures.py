"""Figures of curves, calibration and fits.

Each function returns a Matplotlib figure, and `save` writes it. Tensors may be on any device.
"""

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bqnn.inference.functional import calibration_bins, interval_coverage
from bqnn.plots.style import (
    BLUE,
    COLORS,
    GREY,
    INK,
    ORANGE,
    VERMILION,
    new_figure,
    plain_labels,
    style,
)
from bqnn.plots.style import save as save  # public in this module

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


def curves(csv_path: str | Path) -> "Figure":
    """Draw training and validation curves over epochs, one panel for each metric.

    Args:
        csv_path: A metrics.csv with a column `epoch`, and columns such as train/nll and val/nll,
            which share the panel nll. Empty cells are skipped.

    Raises:
        ValueError: The file has nothing to draw.
    """
    with open(csv_path, newline="") as file:
        reader = csv.DictReader(file)
        header, rows = reader.fieldnames or [], list(reader)
    columns = [name for name in header if name.startswith(("train/", "val/"))]
    if not (rows and columns and "epoch" in header):
        raise ValueError(f"{csv_path}: no rows with an epoch and train/ or val/ columns to draw")
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name in sorted(columns, key=lambda name: name.startswith("val/")):  # train comes first
        split, _, panel = name.partition("/")
        cells = [(row["epoch"], row.get(name)) for row in rows]
        points = [(float(epoch), float(cell)) for epoch, cell in cells if epoch and cell]
        lines.setdefault(panel, {})[split] = points
    return panels(lines, "epoch")


def panels(lines: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], x: str) -> "Figure":
    """Draw one panel for each metric, with one line for each label.

    Args:
        lines: The points (x, y) of each label of each metric. x is a whole number.
        x: The label of the x axis.

    Examples:
        >>> figure = panels({"nll": {"train": [(0, 0.5), (1, 0.3)], "val": [(1, 0.4)]}}, "epoch")
        >>> [axes.get_title() for axes in figure.axes]
        ['nll']
    """
    labels = dict.fromkeys(label for of_panel in lines.values() for label in of_panel)
    colors = dict(zip(labels, itertools.cycle(COLORS), strict=False))
    across = 2 if len(lines) == 4 else min(3, len(lines))
    down = math.ceil(len(lines) / across)
    drawn = {}
    with style():
        figure = new_figure(3.4 * across, 2.5 * down)
        grid = figure.subplots(down, across, squeeze=False, sharex=True).flat
        for (title, of_panel), axes in zip(lines.items(), grid, strict=False):
            for label, points in of_panel.items():
                if points:
                    dot = "o" if len(points) == 1 else None
                    at, values = _array(torch.tensor(points, dtype=torch.float64)).T
                    (drawn[label],) = axes.plot(
                        at, values, color=colors[label], label=label, marker=dot
                    )
            axes.set_title(title)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.xaxis.set_tick_params(labelbottom=True)
            axes.set_xlabel(x)
        for axes in list(grid):  # unused places of the last row
            axes.remove()
        if len(drawn) > 1:
            figure.legend(handles=[*drawn.values()], loc="outside upper center", ncols=len(drawn))
    return figure


def reliability_diagram(probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> "Figure":
    """Draw accuracy against confidence per bin, with the gap between them and the counts.

    Args:
        probabilities: Class probabilities [N, C].
        targets: Classes [N].
        num_bins: The number of bins of equal width.
    """
    confidences, correct = _confidence(probabilities, targets)
    bins = calibration_bins(confidences, correct, num_bins)
    ece = bins.error.item()
    filled = _array(bins.counts) > 0
    centers = ((_array(torch.arange(num_bins)) + 0.5) / num_bins)[filled]
    counts, confidence, accuracy = (_array(values)[filled] for values in bins)
    bar: dict[str, Any] = {"width": 1 / num_bins, "edgecolor": "white", "linewidth": 0.8}
    with style():
        figure = new_figure(4.2, 5.0)
        axes, histogram = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        axes.bar(centers, accuracy, color=BLUE + "B0", label="accuracy", **bar)
        gap = bar | {"edgecolor": VERMILION}
        axes.bar(
            centers, confidence - accuracy, bottom=accuracy, label="gap to confidence",
            facecolor=VERMILION + "50", hatch="////", **gap,
        )  # fmt: skip
        axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1, label="calibrated")
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        axes.set_title(f"ECE {100 * ece:.2f} %")
        axes.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")
        histogram.bar(centers, counts, color=GREY, **bar)
        histogram.set(xlabel="confidence", ylabel="rows", yscale="log", ylim=(0.7, None))
        plain_labels(histogram.yaxis)
    return figure


def confidence_histogram(probabilities: Tensor, targets: Tensor, num_bins: int = 20) -> "Figure":
    """Draw histograms of the confidence of correct and of wrong predictions, as shares of each.

    Args:
        probabilities: Class probabilities [N, C].
        targets: Classes [N].
        num_bins: The number of bins of equal width.
    """
    confidences, correct = _confidence(probabilities, targets)
    with style():
        figure = new_figure(4.8, 3.2)
        axes = figure.subplots()
        groups = (("correct", correct, BLUE, ""), ("wrong", ~correct, VERMILION, "////"))
        for name, mask, color, hatch in groups:
            values = _array(confidences[mask])
            share = [1 / max(1, len(values))] * len(values)
            axes.hist(
                values, weights=share, bins=num_bins, range=(0, 1),
                label=f"{name} ({len(values):,})", histtype="stepfilled", facecolor=color + "40",
                edgecolor=color, linewidth=1.4, hatch=hatch,
            )  # fmt: skip
        axes.set(xlim=(0, 1), xlabel="confidence", ylabel="share of the group")
        axes.legend(loc="upper left")
    return figure


def risk_coverage(curves: Mapping[str, Tensor], risk: str) -> "Figure":
    """Draw the mean loss of the retained rows against their share.

    Args:
        curves: The risk [N] at coverage 1/N, 2/N, ..., 1, for each score that ranks the rows.
        risk: The label of the y axis.
    """
    with style():
        figure = new_figure(4.8, 3.4)
        axes = figure.subplots()
        for (name, values), color in zip(curves.items(), itertools.cycle(COLORS), strict=False):
            coverage = _array(torch.arange(1, len(values) + 1) / len(values))
            label = f"{name}, area {values.mean():.3g}"
            axes.plot(coverage, _array(values), color=color, label=label)
        axes.set(xlim=(0, 1), ylim=(0, None), xlabel="coverage", ylabel=risk)
        axes.legend(loc="upper left", title="rows kept by")
    return figure


def score_histograms(groups: Mapping[str, Tensor], score: str, num_bins: int = 40) -> "Figure":
    """Draw a histogram of an uncertainty score for each group, as shares of the group.

    Args:
        groups: The scores [N] of each group.
        score: The name of the score.
        num_bins: The number of bins of equal width.
    """
    shown = {name: _array(values) for name, values in groups.items()}
    finite = [values[values == values] for values in shown.values()]  # not NaN
    low = min((values.min() for values in finite if len(values)), default=0.0)
    high = max((values.max() for values in finite if len(values)), default=1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # too narrow for bins
        margin = max(0.5, abs(high) / 2)
        low, high = low - margin, high + margin
    with style():
        figure = new_figure(4.8, 3.2)
        axes = figure.subplots()
        for (name, values), color in zip(groups.items(), itertools.cycle(COLORS), strict=False):
            axes.hist(
                shown[name], weights=[1 / len(values)] * len(values), bins=num_bins,
                range=(low, high), label=f"{name}, mean {values.mean():.3g}",
                histtype="stepfilled", facecolor=color + "30", edgecolor=color, linewidth=1.4,
            )  # fmt: skip
        axes.set(xlabel=score, ylabel="share of the group", yscale="log")
        plain_labels(axes.yaxis)
        axes.legend()
    return figure


def weight_grids(panels: Sequence[tuple[str, Tensor, Tensor]]) -> "Figure":
    """Draw the density of weights before rounding, over the share of weights at each integer.

    Args:
        panels: For each panel a title, the weights in units of the step of their grid, and the
            integers.
    """
    across = min(4, len(panels))
    down = math.ceil(len(panels) / across)
    with style():
        figure = new_figure(3.0 * across, 2.2 * down)
        grid = figure.subplots(down, across, squeeze=False).flat
        for (title, steps, integers), axes in zip(panels, grid, strict=False):
            levels, counts = integers.flatten().int().unique(return_counts=True)
            share = _array(counts / integers.numel())
            axes.bar(_array(levels), share, width=0.9, color=ORANGE + "80", label="integers")
            low, high = int(levels.min()) - 1, int(levels.max()) + 1
            bins = min(8 * (high - low), 200)
            density = torch.histc(steps.float(), bins, low, high) / steps.numel()
            width = (high - low) / bins
            centers = torch.linspace(low + width / 2, high - width / 2, bins)
            axes.plot(_array(centers), _array(density / width), color=BLUE, label="weights")
            axes.set_title(title, fontsize=7)
            axes.set_ylim(bottom=0)
        for axes in list(grid):
            axes.remove()
        figure.axes[0].legend(fontsize=6)
        figure.supxlabel("weight, in steps of its grid", fontsize=8)
    return figure


def sensitivity(
    losses: Mapping[str, Mapping[int, float]], chosen: Mapping[str, int], loss: str
) -> "Figure":
    """Draw the loss of each tensor at each width as a table in colour, with the chosen widths.

    Args:
        losses: The loss at each width by tensor; 0 or less counts as no loss.
        chosen: The chosen width of each tensor.
        loss: The label of the colour.
    """
    from matplotlib.colors import LogNorm

    widths = sorted({bits for of in losses.values() for bits in of})
    values = torch.tensor([[of.get(bits, math.nan) for bits in widths] for of in losses.values()])
    positive = values[values > 0]
    low, high = (positive.min().item(), positive.max().item()) if len(positive) else (1e-6, 1.0)
    with style():
        figure = new_figure(2.6 + 0.5 * len(widths), 1.2 + 0.24 * len(losses))
        axes = figure.subplots()
        norm = LogNorm(low, max(high, 1.01 * low))
        shown = _array(values.clamp(min=low))
        image = axes.imshow(shown, norm=norm, cmap="cividis_r", aspect="auto")
        for row, name in enumerate(losses):
            axes.plot(widths.index(chosen[name]), row, marker="o", color=VERMILION, markersize=5)
        axes.set_xticks(range(len(widths)), map(str, widths))
        axes.set_yticks(range(len(losses)), list(losses))
        axes.grid(visible=False)
        axes.set(xlabel="bits (dots: chosen)")
        figure.colorbar(image, label=loss)
    return figure


def interval_calibration(mean: Tensor, std: Tensor, targets: Tensor) -> "Figure":
    """Draw the empirical coverage of central intervals against the nominal one, 5 to 95 percent.

    Args:
        mean: Predicted means [N].
        std: Predicted standard deviations [N].
        targets: Targets [N] in the same units.
    """
    levels = [step / 20 for step in range(1, 20)]
    coverage = _array(interval_coverage(mean, std, targets, levels))
    with style():
        figure = new_figure(4.0, 4.0)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1, label="calibrated")
        axes.fill_between(levels, levels, coverage, color=VERMILION, alpha=0.2, linewidth=0)
        axes.plot(levels, coverage, color=BLUE, marker="o", markersize=4, label="model")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal coverage", ylabel="empirical coverage")
        axes.set_title(f"{100 * coverage[-1]:.1f} % of targets in the 95 % interval")
        axes.text(0.05, 0.75, "above: too wide", color=GREY)
        axes.text(0.95, 0.05, "below: too narrow", color=GREY, ha="right")
        axes.legend(loc="upper left")
    return figure


def regression_fit(mean: Tensor, std: Tensor, targets: Tensor) -> "Figure":
    """Draw predictions with 95 percent intervals against targets, for at most 500 rows.

    Args:
        mean: Predicted means [N].
        std: Predicted standard deviations [N].
        targets: Targets [N] in the same units.
    """
    rows = torch.linspace(0, len(targets) - 1, min(500, len(targets))).round().long()
    mean, std, targets = (values.detach().cpu()[rows] for values in (mean, std, targets))
    inside = (targets - mean).abs() <= 1.96 * std
    with style():
        figure = new_figure(4.4, 4.2)
        axes = figure.subplots()
        groups = (("inside", inside, BLUE, "o"), ("outside", ~inside, VERMILION, "D"))
        for name, mask, color, marker in groups:
            axes.errorbar(
                _array(targets[mask]), _array(mean[mask]), yerr=_array(1.96 * std[mask]),
                fmt=marker, color=color, ecolor=color + "50", markersize=3, elinewidth=1,
                label=f"target {name} 95 % ({int(mask.sum())})",
            )  # fmt: skip
        ends = [_array(targets).min(), _array(targets).max()]
        axes.plot(ends, ends, color=INK, linestyle="--", linewidth=1, zorder=3)
        axes.set(xlabel="target", ylabel="prediction")
        axes.legend(loc="upper left")
    return figure


def synthetic_fit(
    x: Tensor,
    summary: Mapping[str, Tensor],
    truth_mean: Tensor,
    truth_std: Tensor,
    train_x: Tensor,
    train_y: Tensor,
) -> "Figure":
    """Draw a one-dimensional fit, and below it the parts of its uncertainty, with the truth.

    Bands are plus and minus two standard deviations.

    Args:
        x: Inputs [N] in increasing order.
        summary: The `Regression.summary` of the predictions at these inputs.
        truth_mean: The true mean [N] at these inputs.
        truth_std: The true standard deviation [N] of the noise at these inputs.
        train_x: Inputs [M] of the training rows.
        train_y: Targets [M] of the training rows.
    """
    inputs = _array(x).ravel()
    mean, aleatoric, epistemic, total = (
        _array(summary[name]) for name in ("mean", "aleatoric_std", "epistemic_std", "std")
    )
    truth, noise = _array(truth_mean).ravel(), _array(truth_std).ravel()
    with style():
        figure = new_figure(7.2, 5.4)
        fit, parts = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
        above: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}

        bands = (("total", total, "#DFE4E9"), ("epistemic", epistemic, BLUE + "60"))
        for name, std, color in bands:
            fit.fill_between(
                inputs, mean - 2 * std, mean + 2 * std,
                facecolor=color, linewidth=0, label=f"{name}, ±2 std",
            )  # fmt: skip
        for sign in (-2, 2):
            fit.plot(
                inputs, mean + sign * aleatoric, color=ORANGE, linewidth=1.4,
                label="aleatoric, ±2 std" if sign > 0 else None,
            )  # fmt: skip
        fit.plot(inputs, truth, color=INK, linestyle="--", linewidth=1.3, label="truth")
        fit.plot(inputs, mean, color=BLUE, linewidth=2, label="predictive mean")
        fit.scatter(
            _array(train_x).ravel(), _array(train_y).ravel(),
            s=9, color=INK, alpha=0.45, linewidth=0, label="training data",
        )  # fmt: skip
        fit.set(ylabel="y", xlim=(inputs[0], inputs[-1]))
        fit.legend(ncols=3, **above)

        parts.plot(inputs, noise, color=INK, linestyle="--", linewidth=1.3, label="true noise")
        parts.plot(inputs, total, color=GREY, linewidth=3, alpha=0.5, label="total")
        parts.plot(inputs, aleatoric, color=ORANGE, label="aleatoric")
        parts.plot(inputs, epistemic, color=BLUE, linestyle="-.", label="epistemic")
        parts.set(xlabel="x", ylabel="std", ylim=(0, None))
        parts.legend(ncols=4, **above)
    return figure


def _confidence(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest probability of each row [N], and whether its class is correct [N]."""
    confidences, predictions = probabilities.max(-1)
    return confidences, predictions == targets


def _array(values: Tensor) -> "np.ndarray":
    """Convert values to an array that Matplotlib can draw.

    Values that are not finite become NaN, which leaves a gap. Other values are clamped to 1e300,
    because Matplotlib computes margins and differences.
    """
    array = values.detach().double().cpu()
    return torch.where(array.isfinite(), array.clamp(-1e300, 1e300), torch.nan).numpy()
