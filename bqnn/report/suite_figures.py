"""Figures of metrics on distorted images and on out-of-distribution data."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bqnn.plots.style import GREY, legend_name, new_figure, style
from bqnn.report.figures import label, legend, marker, mean_line
from bqnn.report.summary import executed, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

LEVEL = r"^shift/(?P<distortion>.+)_(?P<level>[0-9]{1,6})/(?P<name>[^/]+)$"
UNFAMILIAR = r"^(?P<set>test|ood/[^/]+)/(?P<name>[^/]+)$"
LEVEL_METRICS = (
    *("error", "nll", "ape", "mi", "ece", "rmse", "std"),
    *("coverage_lac", "size_lac", "coverage_cqr", "width_cqr"),
)
OOD_METRICS = ("auroc_entropy", "auroc_mi", "auroc_std", "auroc_epistemic_std", "ape", "mi", "std")


@dataclass(frozen=True)
class SuiteRuns:
    """Evaluations of one task with the same bits and settings. Figures have a line per method.

    Attributes:
        task: The name of the task.
        title: The bits and the settings.
        name: A part of the file names.
        rows: Rows of `summarize`, with every metric.
    """

    task: str
    title: str
    name: str
    rows: "DataFrame"


def suite_runs(scores: "DataFrame") -> Iterator[SuiteRuns]:
    """Group evaluations beyond the test set by task, bits and settings.

    Args:
        scores: The scores of `Runs`.

    Yields:
        Groups of float networks, and of quantized networks with equal bits.
    """
    import pandas as pd

    beyond = scores[scores["verb"] == "evaluate"]
    floats = beyond[beyond["numeric"] == "float"]
    place = ["task", "mode", "setting", "numeric", "weight_bits", "activation_bits"]
    for at, group in pd.concat([floats, executed(beyond)]).groupby(place, dropna=False):
        if not group["metric"].str.match(r"^(shift|ood)/").any():
            continue
        task, mode, setting, numeric, weight, activation = at
        bits = "" if pd.isna(weight) else f"w{weight}a{activation}"
        words = [mode if mode != "float" else "", bits, numeric, setting]
        title = " ".join(word for word in words if word)
        yield SuiteRuns(task, title, "_".join(w for w in words[:3] if w), summarize(group))


def level_figures(runs: SuiteRuns, colors: Mapping[str, str]) -> "Iterator[tuple[str, Figure]]":
    """Draw each main metric against the level of distortion, with a panel per distortion.

    Level 0 is the test set. Lines are means over seeds and splits, and bands are plus and minus one
    standard deviation.

    Args:
        runs: The evaluations.
        colors: The colours of `method_colors`.

    Yields:
        The name of a metric and its figure.
    """
    rows = runs.rows
    at = rows["metric"].str.extract(LEVEL)
    levels = rows.join(at).dropna(subset=["level"])
    levels["level"] = levels["level"].astype(int)
    distortions = sorted(set(levels["distortion"]))
    for name in LEVEL_METRICS:
        of_metric = levels[levels["name"] == name]
        if of_metric.empty:
            continue
        clean = rows[rows["metric"] == f"test/{name}"].assign(level=0)
        with style():
            figure, grid = _panels(len(distortions))
            for distortion, axes in zip(distortions, grid, strict=False):
                of_panel = of_metric[of_metric["distortion"] == distortion]
                for method, own in of_panel.groupby("method"):
                    start = clean[clean["method"] == method]
                    line = [*start.to_dict("records"), *own.to_dict("records")]
                    mean_line(axes, _ordered(line), "level", method, colors)
                axes.set(title=distortion, xlabel="level", ylabel=label(name))
            legend(figure)
        yield name, figure


def ood_figure(runs: SuiteRuns, colors: Mapping[str, str]) -> "Figure | None":
    """Draw the detection of out-of-distribution sets, and the uncertainty on them and on test.

    There is a panel per metric, and a marker per set and method: the mean, with bars of plus and
    minus one standard deviation.

    Args:
        runs: The evaluations.
        colors: The colours of `method_colors`.

    Returns:
        The figure, or None without such a set.
    """
    rows = runs.rows.join(runs.rows["metric"].str.extract(UNFAMILIAR)).dropna(subset=["set"])
    sets = sorted(set(rows["set"]) - {"test"})
    names = [name for name in OOD_METRICS if name in set(rows.loc[rows["set"] != "test", "name"])]
    if not sets or not names:
        return None
    with style():
        figure, grid = _panels(len(names))
        for name, axes in zip(names, grid, strict=False):
            of_metric = rows[rows["name"] == name]
            shown = [of_set for of_set in ("test", *sets) if of_set in set(of_metric["set"])]
            methods = sorted(set(rows["method"]))
            for number, method in enumerate(methods):
                own = of_metric[of_metric["method"] == method].set_index("set").reindex(shown)
                beside = (number - (len(methods) - 1) / 2) * 0.6 / len(methods)
                axes.errorbar(
                    [at + beside for at in range(len(shown))], own["mean"], own["std"].fillna(0),
                    linestyle="none", color=colors[method], marker=marker(colors, method),
                    markersize=4, label=legend_name(method),
                )  # fmt: skip
            axes.set_xticks(range(len(shown)), [s.removeprefix("ood/") for s in shown], rotation=30)
            axes.set_title(label(name))
            if name.startswith("auroc"):
                axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        legend(figure)
    return figure


def _panels(count: int) -> "tuple[Figure, list]":
    across = min(3, count)
    down = math.ceil(count / across)
    figure = new_figure(3.4 * across, 2.6 * down + 0.35)
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def _ordered(rows: list[dict]) -> "DataFrame":
    import pandas as pd

    return pd.DataFrame(rows).sort_values("level")
