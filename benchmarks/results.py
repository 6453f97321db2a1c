"""Write the tables and figures of the documents from docs/results/*.csv: make results

A document has tables between the comments `<!-- table: <name> <options> -->` and
`<!-- end of table -->`. The name is a key of `TABLES`, and the options are `key=value`. `FIGURES`
has the figures. docs/results/index.html is the report of `bqnn report` about the same results.
comparison.py writes the CSV files.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from comparison import CLASSES, OTHER, OTHER_ROWS, VALUES
from pandas import DataFrame, Series
from scipy.stats import ttest_1samp

from bqnn.files import write_text
from bqnn.plots.style import COLORS, GREY, new_figure, save_small, style
from bqnn.report.contents import contents
from bqnn.report.page import page
from bqnn.report.runs import CELL, UNIT, Runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
METHODS = ("pointwise", "mcdropout", "bbb", "laplace", "swag", "sghmc", "ensemble")
BLOCK = re.compile(r"(<!-- table: (\w+)((?: \w+=\S+)*) -->\n)(.*?)(<!-- end of table -->)", re.S)
ALPHA = 0.1  # of the conformal sets
VALIDATION_ROWS = {"digits": 143, "mnist": 6000, "fashion_mnist": 6000}
TEST_ROWS = {"digits": 364, "mnist": 10_000, "fashion_mnist": 10_000}


def comparison() -> str:
    """Compare the methods on each task: quality in float, and in int8 with 4-bit weights."""
    rows = _read("images")
    rows = rows[(rows["form"] == "float") | _is_form(rows, "qat", 4, 7)]
    columns: dict[str, Callable[[DataFrame], str]] = {
        "error %": lambda own: _mean(100 * own["error"], 2),
        "NLL": lambda own: _mean(own["nll"], 4),
        "ECE %": lambda own: _mean(100 * own["ece"], 2),
        "MI": lambda own: _mean(own["mi"], 4),
        "AUROC": lambda own: _mean(own["auroc"], 3),
        "NLL, calibrated": lambda own: _mean(own["calibrated_nll"], 4),
        "seconds": lambda own: f"{own['training_seconds'].mean():.3g}",
        "kB": lambda own: "" if own["bytes"].isna().all() else f"{own['bytes'].mean() / 1000:,.0f}",
    }
    return "\n\n".join(
        f"**{task}**, seconds on {' and '.join(sorted(set(own['hardware'])))}:\n\n"
        + _table(["", "", "n", *columns], _lines(own, columns))
        for task, own in _by_task(rows)
    )


def conformal(score: str) -> str:
    """Show coverage in % / mean number of classes of conformal sets against the bits of weights."""
    return "\n\n".join(
        f"**{task}**:\n\n{_conformal_table(own, score)}" for task, own in _by_task(_bit_rows())
    )


def conformal_errors() -> str:
    """Show how far mean coverages are from the promise, in standard deviations."""
    lines = []
    for task, own in _by_task(_read("images").dropna(subset="coverage_lac")):
        for score in ("lac", "aps", "raps"):
            groups = own.groupby(["method", "form", "weight_bits"], dropna=False)
            found = groups[f"coverage_{score}"].agg(["mean", "count"])
            sd = Series([coverage_deviation(task, n) for n in found["count"]], found.index)
            z = (found["mean"] - (1 - ALPHA)) / sd
            line = [task, score, str(len(z)), f"{100 * found['mean'].mean():.1f}"]
            lines.append([*line, str(int((z.abs() > 2).sum())), f"{z.abs().max():.1f}"])
    header = ["", "sets", "settings", "mean coverage %", "beyond 2 sd", "largest, in sd"]
    return _table(header, lines)


def tables(metric: str) -> str:
    """Compare the methods on tables: mean and standard error over the splits that all have."""
    rows = _read("tables")
    rows = rows[(rows["form"] == "float") | _is_form(rows, "qat", 4, 7)]
    methods = [method for method in METHODS if (rows["method"] == method).any()]
    lines = []
    for task, of_task in rows.groupby("task", sort=False):
        shared = of_task.groupby(["seed", "split"]).filter(
            lambda own: own["method"].nunique() == len(methods)
        )
        for form, own in shared.groupby("form", sort=True):
            cells = [_error(own.loc[own["method"] == method, metric]) for method in methods]
            lines.append([str(task), _form(str(form)), _count(own), *cells])
    return _table(["", "", "n", *methods], lines)


def budget() -> str:
    """Compare budgets of bits with uniform widths of the same size, paired by seed."""
    lines = []
    for (_, method, mode), of_method in _read("budget").groupby(["task", "method", "mode"]):
        by_seed = {name: own.set_index("seed") for name, own in of_method.groupby("measure")}
        baseline = by_seed["uniform 3"]["nll"]
        for name, own in sorted(by_seed.items(), key=lambda item: (item[0][0] != "u", item[0])):
            line = [str(method), str(mode), name, str(len(own)), _mean(own["nll"], 4)]
            line += [_mean(own["mi"], 4), f"{own['bytes'].max() / 1000:.1f}"]
            lines.append([*line, *_paired(own["nll"], baseline)])
    header = ["", "", "bits", "n", "NLL", "MI", "kB", "NLL - that of uniform 3", "p"]
    return _table(header, lines)


TABLES: Mapping[str, Callable[..., str]] = {
    function.__name__: function
    for function in (budget, comparison, conformal, conformal_errors, tables)
}


def draw_bit_widths(path: Path) -> None:
    """Draw the NLL and the mutual information against the bits of weights."""
    figure, of_tasks = _panels({"nll": "NLL", "mi": "mutual information, nats"})
    for _, _, nll, information in of_tasks:
        nll.set_yscale("log")
        information.set_yscale("log")
        information.set_ylim(bottom=1e-4)
    save_small(figure, path)


def draw_conformal(path: Path) -> None:
    """Draw coverage and size of conformal sets against the bits of weights."""
    figure, of_tasks = _panels({"coverage_aps": "coverage", "size_aps": "mean number of classes"})
    for task, own, left, right in of_tasks:
        deviation = coverage_deviation(task, len(set(own["seed"])))
        left.axhspan(1 - ALPHA - 2 * deviation, 1 - ALPHA + 2 * deviation, color=GREY, alpha=0.2)
        right.set_yscale("log")
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter("{x:g}")
    save_small(figure, path)


FIGURES: Mapping[str, Callable[[Path], None]] = {
    "docs/bit_widths.png": draw_bit_widths,
    "docs/conformal.png": draw_conformal,
}


def study() -> Runs:
    """Return the results as the runs of a report."""
    columns = {"images": CLASSES, "tables": VALUES}
    runs = [
        _as_run(row, columns[name])
        for name in columns
        for row in _read(name).astype(object).to_dict("records")
    ]
    table = pd.DataFrame([run for run, _, _ in runs])
    scores = [
        {**{key: run[key] for key in (*CELL, *UNIT, "test_share")}, **score}
        for run, numeric, metrics in runs
        for score in (
            {"numeric": numeric, "metric": metric, "value": value}
            for metric, value in metrics.items()
        )
    ]
    whole = ["weight_bits", "activation_bits", *UNIT]
    types = dict.fromkeys(whole, "Int64")
    return Runs(table.astype(types), pd.DataFrame(scores).astype(types), [])


def write_page(path: Path) -> None:
    """Write the report of the study as one page."""
    with tempfile.TemporaryDirectory() as folder:
        report, _ = contents(study(), Path(folder))
        write_text(path, page(report))


def coverage_deviation(task: str, num_seeds: int) -> float:
    """Return the standard deviation of a mean coverage over seeds.

    The validation rows, on which a threshold is set, differ between seeds. The test rows do not, so
    their share does not shrink with more seeds.
    """
    share = 1 / (num_seeds * VALIDATION_ROWS[task]) + 1 / TEST_ROWS[task]
    return sqrt(ALPHA * (1 - ALPHA) * share)


def rewritten(document: str) -> str:
    """Return a document with its tables made again."""

    def block(found: re.Match[str]) -> str:
        start, name, options, _, end = found.groups()
        given = dict(option.split("=", 1) for option in options.split())
        return f"{start}\n{TABLES[name](**given)}\n\n{end}"

    return BLOCK.sub(block, document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only report documents that differ")
    check = parser.parse_args().check
    differing = []
    for path in sorted((ROOT / "docs").rglob("*.md")):
        text = path.read_text()
        if (new := rewritten(text)) != text:
            differing.append(str(path.relative_to(ROOT)))
            if not check:
                write_text(path, new)
    print(f"{'differ' if check else 'rewritten'}: {', '.join(differing) or 'no document'}")
    if check:
        sys.exit(bool(differing))
    for name, draw in FIGURES.items():
        draw(ROOT / name)
    write_page(RESULTS / "index.html")


def _read(name: str) -> DataFrame:
    return pd.read_csv(RESULTS / f"{name}.csv")


def _as_run(
    row: Mapping[str, Any], columns: Mapping[str, str]
) -> tuple[dict[str, Any], str, dict[str, float]]:
    """Return a row as a run of a report, with its numeric and its metrics."""
    is_float = row["form"] == "float"
    numeric, verb = ("float", "train") if is_float else ("int8", "quantize")
    other = OTHER.get(row["task"], OTHER_ROWS)
    metrics = {
        key.format(other=other): float(row[name])
        for name, key in columns.items()
        if pd.notna(row[name])
    }
    names = ("task", "method", *UNIT, "weight_bits", "activation_bits")
    place = {name: None if pd.isna(row[name]) else row[name] for name in names}
    words = (str(value) for value in (*place.values(), row["form"]) if value is not None)
    prefix = "" if is_float else "int8/"
    run = {
        "run": " ".join(words),
        **place,
        **{"verb": verb, "mode": row["form"], "setting": "", "started": ""},
        "test_share": row.get("test_share", float("nan")),
        **{f"{prefix}{key}": value for key, value in metrics.items()},
    }
    if not is_float:
        run["size/packed_bytes"] = float(row["bytes"])
    return run, numeric, metrics


def _bit_rows() -> DataFrame:
    """Return the rows of tasks whose networks were calibrated at several weight bits."""
    rows = _read("images")
    rows = rows[rows["form"].isin(["float", "ptq"])]
    return rows.groupby("task").filter(lambda own: own["weight_bits"].nunique() > 1)


def _by_task(rows: DataFrame) -> Iterable[tuple[str, DataFrame]]:
    return ((str(task), own) for task, own in rows.groupby("task", sort=True))


def _is_form(rows: DataFrame, form: str, weight_bits: int, activation_bits: int) -> "Series[bool]":
    bits = (rows["weight_bits"] == weight_bits) & (rows["activation_bits"] == activation_bits)
    return (rows["form"] == form) & bits


def _by_method(rows: DataFrame) -> Iterable[tuple[str, DataFrame]]:
    for method in METHODS:
        own = rows[rows["method"] == method]
        if len(own):
            yield method, own


def _conformal_table(rows: DataFrame, score: str) -> str:
    widths = sorted(rows["weight_bits"].dropna().unique(), reverse=True)

    def cell(own: DataFrame) -> str:
        coverage, size = own[f"coverage_{score}"].mean(), own[f"size_{score}"].mean()
        return f"{100 * coverage:.1f} / {size:.2f}" if len(own) else ""

    lines = []
    for method, own in _by_method(rows):
        cells = [own[own["form"] == "float"], *(own[own["weight_bits"] == w] for w in widths)]
        lines.append([method, _count(own), *map(cell, cells)])
    return _table(["", "n", "float", *(f"{w:.0f} bits" for w in widths)], lines)


def _lines(
    rows: DataFrame, columns: Mapping[str, Callable[[DataFrame], str]]
) -> Iterable[list[str]]:
    """Yield a line for each method and form, float first."""
    for method, of_method in _by_method(rows):
        for form, own in of_method.groupby("form", sort=True):
            cells = [make(own) for make in columns.values()]
            yield [method if form == "float" else "", _form(str(form)), _count(own), *cells]


def _form(form: str) -> str:
    return "float" if form == "float" else "int8 (4,7)"


def _count(rows: DataFrame) -> str:
    return str(len(rows[["seed", "split"]].drop_duplicates()))


def _mean(values: "Series[float]", digits: int) -> str:
    """Format a mean and the standard deviation over seeds; values that are missing are left out."""
    values = values.dropna()
    if values.empty:
        return ""
    if values.abs().max() < 0.5 * 10**-digits:
        return "0"
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def _error(values: "Series[float]") -> str:
    """Format a mean and its standard error."""
    if values.empty:
        return ""
    spread = f" ± {values.sem():.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread}"


def _paired(values: "Series[float]", baseline: "Series[float]") -> list[str]:
    """Format the mean of differences by seed, its standard deviation and p of the paired t test."""
    differences = (values - baseline).dropna()
    if (differences == 0).all():
        return ["", ""]
    return [_mean(differences, 4), f"{ttest_1samp(differences, 0).pvalue:.3f}"]


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _panels(columns: Mapping[str, str]) -> "tuple[Figure, list[tuple[str, DataFrame, Axes, Axes]]]":
    """Draw two columns of results against the bits of weights, a row of panels per task."""
    of_tasks = list(_by_task(_bit_rows()))
    with style():
        figure = new_figure(7.0, 2.7 * len(of_tasks) + 0.5)
        grid = figure.subplots(len(of_tasks), 2, squeeze=False)
        for (task, own), row in zip(of_tasks, grid, strict=True):
            for axes, (column, title) in zip(row, columns.items(), strict=True):
                _curves(axes, own, column)
                axes.set_title(f"{task}: {title}")
        handles, names = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=4)
    return figure, [(*found, *row) for found, row in zip(of_tasks, grid, strict=True)]


def _curves(axes: "Axes", rows: DataFrame, column: str) -> None:
    """Draw means and deviations over seeds; float is dashed. All zeros are left out."""
    for color, (method, own) in zip((*COLORS, GREY), _by_method(rows), strict=False):
        if not own[column].any():
            continue
        bits = own[own["form"] == "ptq"].groupby("weight_bits")[column].agg(["mean", "std"])
        axes.plot(bits.index, bits["mean"], color=color, marker="o", markersize=3, label=method)
        low, high = bits["mean"] - bits["std"], bits["mean"] + bits["std"]
        axes.fill_between(bits.index, low, high, color=color, alpha=0.12, linewidth=0)
        value = own.loc[own["form"] == "float", column].mean()
        axes.axhline(value, color=color, linestyle=(0, (4, 2)), linewidth=0.8)
    axes.set_xlabel("weight bits")


if __name__ == "__main__":
    main()
