"""NLL and mutual information against the packed size: budgets of bits beside uniform widths."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bqnn.plots.style import legend_name, new_figure, plain_labels, style
from bqnn.report.figures import label, legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

SIZE = "size/packed_bytes"
METRICS = ("test/nll", "test/mi")
LIMIT = re.compile(r"quant\.budget\.(?:bytes|mean_bits|mean_activation_bits)=(\S+)")
LOOKS = {"uniform": ("s", "-"), "budget": ("o", "--")}


def front(runs: "DataFrame") -> "DataFrame | None":
    """Summarize the runs of quantize.py by size, with a row per method, mode, setting and bits.

    Args:
        runs: The runs of one task.

    Returns:
        The columns method, mode, setting (without limits), bits (`w3`, or the limits of a budget),
        kind (uniform or budget), bytes, n, and for each metric its mean, its standard deviation
        and the mean of the float networks. None if no budget is among the runs.
    """
    import pandas as pd

    rows = runs[(runs["verb"] == "quantize") & (runs["mode"] != "float")]
    names = [name for name in METRICS if f"int8/{name}" in rows]
    if SIZE not in rows or not names:
        return None
    rows = rows[(rows[SIZE] > 0) & rows[f"int8/{names[0]}"].notna()]
    is_budget = rows["weight_bits"].isna()
    if not is_budget.any():
        return None
    limits = rows["setting"].map(_limits)
    widths = "w" + rows["weight_bits"].astype(str)
    rows = rows.assign(
        kind=is_budget.map({True: "budget", False: "uniform"}),
        bits=limits.where(is_budget, widths),
        setting=rows["setting"].map(lambda text: " ".join(LIMIT.sub("", text).split())),
    )
    lines = []
    for key, own in rows.groupby(["method", "mode", "setting", "kind", "bits"]):
        line = dict(zip(("method", "mode", "setting", "kind", "bits"), key, strict=True))
        line |= {"bytes": round(own[SIZE].mean()), "n": len(own)}
        for name in names:
            values = own[f"int8/{name}"]
            line |= {name: values.mean(), f"{name} std": values.std()}
            if f"float/{name}" in own:
                line[f"{name} float"] = own[f"float/{name}"].mean()
        lines.append(line)
    order = ["method", "mode", "setting", "bytes"]
    return pd.DataFrame(lines).sort_values(order, ignore_index=True)


def front_figure(table: "DataFrame", colors: Mapping[str, str]) -> "Figure":
    """Draw each metric of `front` against the size, uniform widths solid and budgets dashed.

    Bars are plus and minus one standard deviation. A dotted line is the float network.

    Args:
        table: The table of `front`.
        colors: The colours of the methods.
    """
    names = [name for name in METRICS if name in table and (table[name] > 0).any()]
    with style():
        figure = new_figure(3.8 * len(names), 3.4)
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for name, axes in zip(names, panels, strict=True):
            for (method, mode, setting, kind), own in table.groupby(
                ["method", "mode", "setting", "kind"]
            ):
                mark, line = LOOKS[kind]
                text = " ".join(filter(None, (method, mode, setting, kind)))
                axes.errorbar(
                    own["bytes"] / 1000, own[name], yerr=own[f"{name} std"].fillna(0),
                    label=legend_name(text), color=colors[method], marker=mark, linestyle=line,
                    fillstyle="full" if mode == "qat" else "none", markersize=4, elinewidth=0.8,
                )  # fmt: skip
                if f"{name} float" in own:
                    value = own[f"{name} float"].mean()
                    axes.axhline(value, color=colors[method], linestyle=":", linewidth=0.8)
            axes.set_xscale("log")
            plain_labels(axes.xaxis, minor="{x:g}")
            axes.set(xlabel="packed size, kB", title=label(name))
        legend(figure)
    return figure


def _limits(setting: str) -> str:
    """Return the limits in the label of a setting, such as mean_bits=3.0."""
    found = (match for match in LIMIT.finditer(setting) if match[1] != "None")
    return " ".join(match[0].removeprefix("quant.budget.") for match in found) or "budget"
