"""The sections of a report and their order."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bqnn.plots.style import save_small
from bqnn.report.figures import (
    Sweep,
    bit_widths,
    file_name,
    method_colors,
    size_figure,
    sweeps,
)
from bqnn.report.front import front, front_figure
from bqnn.report.page import Section
from bqnn.report.paired import paired_differences
from bqnn.report.runs import CELL, UNIT, Runs
from bqnn.report.suite_figures import SuiteRuns, level_figures, ood_figure, suite_runs
from bqnn.report.summary import (
    BASELINE,
    CONVERGENCE,
    MAIN_KEYS,
    beside_pointwise,
    main_metrics,
    missing_cells,
    summarize,
)
from bqnn.report.tables import cells
from bqnn.text import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

LEFT_OUT = "The numbers below exclude these runs."
BESIDE = (
    "Means over the n seeds and splits that a method shares with the pointwise network of the same "
    "bits, whose mean is in the next column. float: as trained; PTQ: calibrated; QAT: "
    "fine-tuned; both executed in int8."
)
MEANS = (
    "Means over n seeds and splits. float: as trained; PTQ: calibrated; QAT: fine-tuned; both "
    "executed in int8. There is no pointwise network with the same bits to compare with."
)
LEVELS = (
    "Metrics on increasingly distorted images; level 0 is the test set. Lines: means over seeds "
    "and splits. Bands: plus and minus one standard deviation."
)
OOD = (
    "Does uncertainty separate out-of-distribution data from test data? auroc: 0.5 (dotted) is "
    "chance, 1 is perfect. Other metrics: means over the rows of a set. Bars: plus and minus one "
    "standard deviation over seeds and splits."
)
BANDS = (
    "Lines: means over seeds and splits. Bands: plus and minus one standard deviation. Dashed "
    "lines: the same networks in float."
)
CONFORMAL = (
    "Prediction sets calibrated on validation rows (lac, aps, raps), or intervals (normalized, "
    "cqr): the share of targets that they cover, the least one of a class, and their mean size. "
    "The dotted line is the coverage that they are made for."
)
PAIRS = (
    "Differences a - b, paired by seed and split: mean and standard deviation over n pairs, and "
    "two-sided p values of the paired t test and of Wilcoxon's signed-rank test. Splits of one "
    "data set share rows: p_corrected is a t test that allows for that, and the other two are too "
    "small there. No p value is corrected for multiple tests. differences.csv has every metric "
    "and every pair of methods."
)
FRONT = (
    "int8 networks whose bits of each layer a budget chooses (dashed lines), beside uniform widths "
    "(solid), against the size of the packed parameters. Filled marks: fine-tuned; empty: "
    "calibrated. Bars: plus and minus one standard deviation over seeds and splits. Dotted lines: "
    "the same networks in float."
)
CHAINS = (
    "rhat: the rank-normalized split R-hat of the validation NLL of the members; near 1, the "
    "chains and their halves agree. ess: the number of independent members with the same "
    "information. Means over n seeds and splits."
)
SUMMARY = (
    "Over seeds and splits: the mean, the standard deviation of single runs (std), the standard "
    "error of the mean, and the number of runs (n). summary.csv has every metric."
)
# One level of a distortion; the mean of the levels ends with _mean instead.
LEVEL = r"^(?:calibrated/)?shift/.+_[0-9]{1,6}/"


def contents(runs: Runs, plots: Path) -> "tuple[Section, dict[str, DataFrame]]":
    """Create the report of many runs, and draw its figures.

    Args:
        runs: The runs.
        plots: The folder for the figures.

    Returns:
        The report, and the tables of its CSV files by name.
    """
    import pandas as pd

    table, scores = runs.runs, runs.scores
    problems = [*runs.problems, *missing_cells(table)] if len(table) else runs.problems
    files = {"problems": pd.DataFrame(problems, columns=["run", "state", "reason"])}
    counts = Counter(problem.state.lower() for problem in problems)
    totals = [counted(len(table), "run"), *(f"{count} {state}" for state, count in counts.items())]
    report = Section("bqnn report", 1, f"{', '.join(totals)}.")
    if problems:
        title, listed = f"Excluded runs ({len(problems)})", cells(files["problems"])
        report.parts.append(Section(title, 2, LEFT_OUT, table=listed, is_warning=True))
    if table.empty:
        return report, files

    unlevelled = scores[~scores["metric"].str.contains(LEVEL)]
    by_task = {
        "results": table,
        "summary": summarize(scores),
        "beside_pointwise": beside_pointwise(scores),
        "differences": paired_differences(unlevelled),
    }
    colors, found, suites = (
        method_colors(scores),
        list(sweeps(unlevelled)),
        list(suite_runs(scores)),
    )
    for task in sorted(set(table["task"])):
        own = {
            name: file[file["task"] == task].drop(columns="task") if len(file) else file
            for name, file in by_task.items()
        }
        parts = [
            _beside(own["beside_pointwise"]),
            *(_sweep(sweep, colors, plots) for sweep in found if sweep.task == task),
            *(_suite(each, colors, plots) for each in suites if each.task == task),
            _size(task, own["results"], colors, plots),
            _front(task, own["results"], colors, plots),
            _pairs(own["differences"]),
            _convergence(own["summary"]),
            Section("Summary", 3, SUMMARY, table=_shown(main_metrics(own["summary"])), folded=True),
        ]
        report.parts.append(Section(task, 2, parts=[part for part in parts if part is not None]))
    main = [name for name in table if name.removeprefix("int8/") in MAIN_KEYS]
    every = _shown(table[["run", *CELL, *UNIT, *main]])
    report.parts.append(Section("All runs", 2, table=every))
    return report, files | by_task


def _beside(table: "DataFrame") -> Section | None:
    """Compare each method with the pointwise network, or list means if there is no pair."""
    if table.empty:
        return None
    pairs = [name for name in table if name.endswith(f", {BASELINE}")]
    if table[pairs].notna().to_numpy().any():
        others = table[table["method"] != BASELINE]
        return Section("Methods beside the pointwise network", 3, BESIDE, table=_shown(others))
    return Section("Means", 3, MEANS, table=_shown(table))


def _sweep(sweep: Sweep, colors: Mapping[str, str], plots: Path) -> Section:
    """Draw one figure per test metric, and one folded figure for each other set."""
    axis = sweep.axis.replace("_", " ")
    section = Section(f"Against {axis} ({sweep.title})", 3, BANDS)

    def draw(name: str, metrics: list[str]) -> tuple[str, Path]:
        path = plots / f"{sweep.name}_{file_name(*name.split('/'))}.png"
        return f"{name} against {axis}", save_small(bit_widths(sweep, metrics, colors), path)

    for name, metrics in sweep.sets().items():
        if name == "test":
            draw(name, [metric for metric in metrics if metric in MAIN_KEYS])
            section.figures = [draw(metric, [metric]) for metric in metrics]
        else:
            section.parts.append(Section(name, 4, figures=[draw(name, metrics)], folded=True))
    for name, metrics in sweep.conformal().items():
        figures = [draw(f"{name}/conformal", metrics)]
        title = f"Conformal sets of {name}"
        section.parts.append(Section(title, 4, CONFORMAL, figures, folded=name != "test"))
    return section


def _suite(runs: SuiteRuns, colors: Mapping[str, str], plots: Path) -> Section:
    """Draw the metrics on distorted images and on out-of-distribution data."""
    section = Section(f"Shift and other data ({runs.title})", 3)

    def saved(name: str, figure: "Figure") -> Path:
        return save_small(figure, plots / f"{file_name(runs.task, runs.name, name)}.png")

    levels = [
        (f"{name} against the level of distortion", saved(f"shift_{name}", figure))
        for name, figure in level_figures(runs, colors)
    ]
    if levels:
        section.parts.append(Section("Against the level of distortion", 4, LEVELS, levels))
    figure = ood_figure(runs, colors)
    if figure is not None:
        figures = [("uncertainty on other data", saved("ood", figure))]
        section.parts.append(Section("Out-of-distribution data", 4, OOD, figures))
    return section


def _size(task: str, runs: "DataFrame", colors: Mapping[str, str], plots: Path) -> Section | None:
    figure = size_figure(runs, colors)
    if figure is None:
        return None
    path = save_small(figure, plots / f"{file_name(task, 'size')}.png")
    return Section("Against size", 3, figures=[("quality against the packed size", path)])


def _front(task: str, runs: "DataFrame", colors: Mapping[str, str], plots: Path) -> Section | None:
    table = front(runs)
    if table is None:
        return None
    path = save_small(front_figure(table, colors), plots / f"{file_name(task, 'front')}.png")
    figures = [("NLL and mutual information against the packed size", path)]
    return Section("Budgets of bits", 3, FRONT, figures, table=_shown(table))


def _pairs(differences: "DataFrame") -> Section | None:
    """List the differences of main metrics; of methods only those from the pointwise network."""
    if differences.empty:
        return None
    shown = main_metrics(differences)
    if (shown["b"] == BASELINE).any():
        shown = shown[(shown["kind"] != "methods") | (shown["b"] == BASELINE)]
    table = _shown(shown.drop(columns="numeric"))
    return Section("Paired differences", 3, PAIRS, table=table, folded=True)


def _convergence(summary: "DataFrame") -> Section | None:
    """List R-hat and the effective sample size of the runs that have them."""
    if summary.empty:
        return None
    found = summary[summary["metric"].isin(CONVERGENCE)]
    if found.empty:
        return None
    return Section("Convergence of Markov chains", 3, CHAINS, table=_shown(found))


def _shown(table: "DataFrame") -> "DataFrame":
    """Format a table as strings, without columns that are empty, the settings included."""
    return cells(table.replace({"setting": {"": None}}))
