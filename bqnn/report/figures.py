"""Figures of metrics against bit widths and against size, with one line per method."""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bqnn.plots.style import COLORS, GREY, legend_name, new_figure, plain_labels, style
from bqnn.report.runs import UNIT
from bqnn.report.summary import MAIN_KEYS, executed, summarize
from bqnn.text import valid_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

AXES = {"weight_bits": "activation_bits", "activation_bits": "weight_bits"}
LONGEST_PART = 50  # characters per part of a file name; file systems allow 255 bytes in total
MARKERS, LINES = "os^DvP", ("-", "--", ":", "-.")
# Coverage and size of conformal sets, by any score.
CONFORMAL = r".*/(coverage|worst_class_coverage|size|width)_[a-z]+$"
UNITS = dict.fromkeys(("nll", "nll_mixture", "ape", "mi", "aleatoric"), "nats")


@dataclass(frozen=True)
class Sweep:
    """Quantized runs of all methods that differ in one bit width, and their float values.

    Attributes:
        name: The start of the names of its files.
        title: The setting that the runs share.
        task: The name of the task.
        axis: The width that varies, weight_bits or activation_bits.
        lines: Rows of `summarize`, sorted by the width.
        floats: The mean of the float networks by method and metric.
    """

    name: str
    title: str
    task: str
    axis: str
    lines: "DataFrame"
    floats: dict[tuple[str, str], float]

    def sets(self) -> dict[str, list[str]]:
        """Return the metrics of each set: {"test": ["test/error", ...], "ood/uniform": ...}.

        The metrics of conformal sets are not among them.
        """
        sets: dict[str, list[str]] = {}
        for metric in self.lines["metric"].unique():
            if not re.match(rf"{CONFORMAL}|conformal/", metric):
                sets.setdefault(metric.rpartition("/")[0], []).append(metric)
        order = {name: number for number, name in enumerate(MAIN_KEYS)}
        for metrics in sets.values():
            metrics.sort(key=lambda name: (order.get(name, len(order)), name))
        return sets

    def conformal(self) -> dict[str, list[str]]:
        """Return the metrics of conformal sets, for each set of rows.

        The coverage and the size by one score are beside each other.
        """
        sets: dict[str, list[str]] = {}
        for metric in self.lines["metric"].unique():
            if re.match(CONFORMAL, metric):
                sets.setdefault(metric.rpartition("/")[0], []).append(metric)
        for metrics in sets.values():
            metrics.sort(key=lambda name: (name.rpartition("_")[2], name.rpartition("/")[2]))
        return sets

    @property
    def level(self) -> float | None:
        """The coverage that conformal sets are made for, or None without a single one."""
        found = self.lines.loc[self.lines["metric"] == "conformal/level", "mean"]
        levels = found.round(9).unique()  # a mean of equal numbers may round
        return float(levels[0]) if len(levels) == 1 else None


def sweeps(scores: "DataFrame") -> Iterator[Sweep]:
    """Find the sweeps over weight bits or activation bits, with the other width fixed.

    Args:
        scores: The scores of `Runs`.

    Yields:
        Sweeps of at least two widths.
    """
    place = ["task", "verb", "mode", "setting", "numeric"]
    for (task, verb, mode, setting, numeric), group in executed(scores).groupby(place):
        floats = _float_means(scores, task, verb, setting)
        for axis, fixed in AXES.items():
            for width, lines in summarize(group).groupby(fixed):
                if lines[axis].nunique() < 2:
                    continue
                kind = ["" if verb == "quantize" else verb, mode, setting]
                words = " ".join(word for word in kind if word)
                yield Sweep(
                    name=file_name(task, *kind, axis, f"{fixed[0]}{width}"),
                    title=f"{words}, {numeric}, {width} {fixed.replace('_', ' ')}",
                    task=task,
                    axis=axis,
                    lines=lines.sort_values(axis),
                    floats=floats,
                )


def method_colors(scores: "DataFrame") -> dict[str, str]:
    """Assign a colour to each method, for all figures of a report."""
    return dict(zip(sorted(set(scores["method"])), itertools.cycle(COLORS), strict=False))


def bit_widths(sweep: Sweep, metrics: Sequence[str], colors: Mapping[str, str]) -> "Figure":
    """Draw metrics against the bit width of a sweep, one panel for each metric.

    Lines are means over seeds and splits, bands are plus and minus one standard deviation, and
    dashed lines are the same networks in float. The scale is logarithmic if the values span more
    than a factor of ten. A method that is 0 everywhere is then listed instead of drawn.

    Args:
        sweep: The runs.
        metrics: Metrics of the sweep.
        colors: The colours of `method_colors`.
    """
    across = 2 if len(metrics) in (2, 4) else min(3, len(metrics))
    down = math.ceil(len(metrics) / across)
    with style():
        figure = new_figure(3.4 * across, 2.5 * down + 0.35)
        grid = figure.subplots(down, across, squeeze=False).flat
        for metric, axes in zip(metrics, grid, strict=False):
            _panel(axes, sweep, metric, colors)
        for axes in list(grid):
            axes.remove()
        legend(figure)
    return figure


def size_figure(runs: "DataFrame", colors: Mapping[str, str]) -> "Figure | None":
    """Draw accuracy (RMSE for regression) against packed size, with a line per method and mode.

    The colour shows the method; marker and line style show the mode and the setting. The points of
    a line have increasing weight bits, and the most frequent activation bits. Circles without a
    line are the float networks.

    Args:
        runs: The runs of one task.
        colors: The colours of `method_colors`.

    Returns:
        The figure, or None without quantized runs.
    """
    rows = runs[(runs["verb"] == "quantize") & runs["activation_bits"].notna()]
    rows = rows[rows["weight_bits"].notna()]  # `front_figure` draws budgets
    sizes = ["size/packed_bytes", "size/float_bytes"]
    qualities = [name for name in ("int8/test/error", "int8/test/rmse") if name in rows]
    if not qualities or not {*sizes} <= {*rows}:
        return None
    is_classification = bool(rows[qualities[0]].notna().any()) and "error" in qualities[0]
    rows = rows[(rows[sizes] > 0).all(axis=1)]  # required by the logarithmic axis
    rows = rows[rows[qualities[0] if is_classification else qualities[-1]].notna()]
    if rows.empty:
        return None
    rows = rows[rows["activation_bits"] == rows["activation_bits"].mode()[0]]
    with style():
        figure = new_figure(5.2, 3.6)
        axes = figure.subplots()
        procedures = rows["mode"].str.cat(rows["setting"], sep=" ").str.strip()
        # The first marker, the circle, is for the float networks.
        marks = zip(itertools.cycle(MARKERS[1:]), itertools.cycle(LINES), strict=False)
        looks = dict(zip(sorted(set(procedures)), marks, strict=False))
        for (method, procedure), own in rows.groupby(["method", procedures]):
            color, (mark, line) = colors[method], looks[procedure]
            groups = own.groupby("weight_bits")
            points = groups["size/packed_bytes"].mean() / 1000
            values = _quality(own, "int8", is_classification).groupby(own["weight_bits"])
            table = values.agg(mean="mean", std="std")
            look = {"color": color, "marker": mark, "linestyle": line}
            _line(axes, points, table, label=f"{method} {procedure}", **look)
            if f"float/test/{'error' if is_classification else 'rmse'}" in own:
                axes.plot(
                    own["size/float_bytes"].mean() / 1000,
                    _quality(own, "float", is_classification).mean(),
                    marker="o", markerfacecolor="none", color=color, linestyle="none",
                )  # fmt: skip
        axes.set_xscale("log")
        plain_labels(axes.xaxis, minor="{x:g}")
        axes.set_xlabel("size of the parameters, kB (packed; circles: float)")
        axes.set_ylabel("accuracy" if is_classification else "RMSE")
        legend(figure)
    return figure


def file_name(*parts: str) -> str:
    """Build a file name from arbitrary strings, and skip empty ones.

    A part that is too long or has invalid characters is converted by `valid_name`, and gets a hash
    that keeps it unique.

    Examples:
    >>> file_name("digits", "", "weight_bits", "a7"), file_name("my digits")
    ('digits_weight_bits_a7', 'my-digits_60fab83b')
    """
    return "_".join(_file_name(part) for part in parts if part)


def label(metric: str) -> str:
    """Return the name and the unit of a metric, without its set.

    Examples:
        >>> label("ood/uniform/nll"), label("test/error")
        ('nll, nats', 'error')
    """
    name = metric.rpartition("/")[2]
    return f"{name}, {UNITS[name]}" if name in UNITS else name


def _panel(axes: "Axes", sweep: Sweep, metric: str, colors: Mapping[str, str]) -> None:
    from matplotlib.ticker import LogLocator

    lines = sweep.lines[sweep.lines["metric"] == metric]
    floats = [value for (_, name), value in sweep.floats.items() if name == metric]
    values = [*lines["mean"], *floats]
    positive = [value for value in values if value > 0]
    is_log = min(values) >= 0 and bool(positive) and max(positive) > 10 * min(positive)
    zeros = []
    for method, rows in lines.groupby("method"):
        if is_log and (rows["mean"] == 0).all():
            zeros.append(method)
        mean_line(axes, rows, sweep.axis, method, colors)
        if (method, metric) in sweep.floats:
            value = sweep.floats[method, metric]
            axes.axhline(value, color=colors[method], linestyle=(0, (4, 2)), linewidth=1)
    if is_log:
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(0.7 * min(positive), 1.4 * max(positive))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plain_labels(axes.yaxis)
    if zeros:
        text = f"{', '.join(zeros)}: 0"
        axes.text(0.98, 0.96, text, transform=axes.transAxes, ha="right", va="top", color=GREY)
    if "coverage_" in metric and sweep.level is not None:
        axes.axhline(sweep.level, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_title(label(metric))
    axes.set_xlabel(sweep.axis.replace("_", " "))
    axes.set_xticks(sorted(set(sweep.lines[sweep.axis])))


def marker(colors: Mapping[str, str], method: str) -> str:
    """Return the marker of a method, which depends on its place among the colours."""
    return MARKERS[list(colors).index(method) % len(MARKERS)]


def mean_line(
    axes: "Axes", rows: "DataFrame", x: str, method: str, colors: Mapping[str, str]
) -> None:
    """Draw the means of a method against the column `x`, with a band of one standard deviation."""
    look = {"color": colors[method], "marker": marker(colors, method)}
    _line(axes, rows[x], rows, label=method, **look)


def _line(axes: "Axes", x: Any, rows: "DataFrame", **look: Any) -> None:
    x, mean = x.astype(float), rows["mean"]
    spread = rows["std"].fillna(0)  # one seed has no spread
    axes.plot(x, mean, markersize=4, **look | {"label": legend_name(look["label"])})
    axes.fill_between(x, mean - spread, mean + spread, color=look["color"], alpha=0.15, linewidth=0)


def legend(figure: "Figure") -> None:
    """Add one legend for all panels above them."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    columns = max(1, int(figure.get_figwidth() / 1.5))
    figure.legend(handles, names, loc="outside upper center", ncols=min(columns, len(names)))


def _quality(rows: "DataFrame", numeric: str, is_classification: bool) -> Any:
    if is_classification:
        return 1 - rows[f"{numeric}/test/error"]
    return rows[f"{numeric}/test/rmse"]


def _float_means(
    scores: "DataFrame", task: str, verb: str, setting: str
) -> dict[tuple[str, str], float]:
    """Average the metrics of float networks, and count each seed and split once.

    Prefers float results of the same script and setting: quantize.py evaluates the float network
    that it starts from, and evaluate.py has settings of its own.
    """
    floats = scores[(scores["task"] == task) & (scores["numeric"] == "float")]
    of_script = floats[floats["verb"] == verb]
    of_setting = of_script[of_script["setting"] == setting]
    trained = floats[floats["verb"] == "train"]
    rows = next((rows for rows in (of_setting, of_script, trained) if len(rows)), floats)
    once = rows.drop_duplicates(["method", "setting", "metric", *UNIT])
    return once.groupby(["method", "metric"])["value"].mean().to_dict()


def _file_name(part: str) -> str:
    name = valid_name(part, LONGEST_PART)
    if name == part:
        return name
    return f"{name}_{hashlib.sha256(part.encode(errors='surrogatepass')).hexdigest()[:8]}"
