"""Means over seeds and splits, and each method compared with the pointwise network."""

from typing import TYPE_CHECKING

from bqnn.report.runs import CELL, UNIT, Problem

if TYPE_CHECKING:
    from pandas import DataFrame

MAIN_KEYS = [
    f"test/{name}"
    for name in ("error", "nll", "nll_mixture", "ape", "mi", "ece", "rmse", "crps", "coverage95")
]
CONVERGENCE = ["val/rhat", "val/ess"]  # of the chains of sghmc
BASELINE = "pointwise"
PROCEDURES = {
    ("quantize", "ptq"): "PTQ",
    ("quantize", "qat"): "QAT",
    ("train", "qat"): "QAT from the start",
}


def summarize(scores: "DataFrame") -> "DataFrame":
    """Summarize each metric over seeds and splits.

    Args:
        scores: The scores of `Runs`.

    Returns:
        A row per cell, numeric and metric, with the columns mean, std, standard_error and n. The
        standard deviation divides by n - 1, and is NaN for n = 1.
    """
    groups = scores.groupby([*CELL, "numeric", "metric"], dropna=False)["value"]
    return groups.agg(mean="mean", std="std", standard_error="sem", n="count").reset_index()


def executed(scores: "DataFrame") -> "DataFrame":
    """Select the rows of int8, or of simulated in cells without int8."""
    is_int8 = scores["numeric"] == "int8"
    has_int8 = is_int8.groupby([scores[name] for name in CELL], dropna=False).transform("any")
    return scores[is_int8 | ((scores["numeric"] == "simulated") & ~has_int8)]


def main_metrics(scores: "DataFrame") -> "DataFrame":
    """Select the main metrics of the test set."""
    return scores[scores["metric"].isin(MAIN_KEYS)]


def beside_pointwise(scores: "DataFrame") -> "DataFrame":
    """Compare the main test metrics of each method with those of the pointwise network.

    Args:
        scores: The scores of `Runs`.

    Returns:
        A row per task, setting, metric, bits and method. The columns float, PTQ and QAT (executed
        in int8) are each followed by the pointwise network. Both are means over the n seeds and
        splits that the two share; if they share none, the row has only the mean of the method. If n
        differs between columns, it is given for each.
    """
    import pandas as pd

    place = ["task", "setting", "metric", "weight_bits", "activation_bits"]
    columns: dict[str, list[DataFrame]] = {}
    for name, values in _columns(main_metrics(scores)).items():
        table = values.pivot(index=[*place, *UNIT], columns="method", values="value")
        for method in table:
            pair = table[[method]].set_axis([name], axis=1).dropna()
            if method != BASELINE and BASELINE in table:
                pair[f"{name}, {BASELINE}"] = table[BASELINE]
                is_shared = pair[f"{name}, {BASELINE}"].notna()
                is_alone = ~is_shared.groupby(level=place, dropna=False).transform("any")
                pair = pair[is_shared | is_alone]
            means = pair.groupby(level=place, dropna=False).agg("mean")
            means[f"n {name}"] = pair.groupby(level=place, dropna=False).size()
            means.index = pd.MultiIndex.from_frame(means.index.to_frame().assign(method=method))
            columns.setdefault(name, []).append(means)
    if not columns:
        return pd.DataFrame()
    joined = pd.concat([pd.concat(parts) for parts in columns.values()], axis=1)
    counts = joined[[f"n {name}" for name in columns]]
    joined["n"] = [_counts(dict(zip(columns, row, strict=True))) for row in counts.to_numpy()]
    order = [c for name in columns for c in (name, f"{name}, {BASELINE}") if c in joined]
    table = joined[["n", *order]].reset_index()
    table["metric"] = pd.Categorical(table["metric"], MAIN_KEYS)  # sorted in this order
    return table.sort_values([*place, "method"], ignore_index=True)


def missing_cells(runs: "DataFrame") -> list[Problem]:
    """Find missing runs: seeds, splits or bit widths that only some methods have.

    Methods are compared within a task, script and mode. A single run is ignored as a trial if its
    method has more runs of another setting. So are runs whose bits a budget chooses.

    Args:
        runs: The runs of `Runs`.

    Returns:
        A problem for each group of missing runs.
    """
    problems = []
    bits = ["weight_bits", "activation_bits"]
    runs = runs[(runs["mode"] == "float") | runs[bits].notna().all(axis=1)]
    for (task, verb, mode), group in runs.groupby(["task", "verb", "mode"]):
        sizes = group.groupby(["method", "setting"])["run"].transform("size")
        most = sizes.groupby(group["method"]).transform("max")
        group = group[(sizes > 1) | (most == 1)]
        expected = group[[*bits, *UNIT]].drop_duplicates()
        for (method, setting), own in group.groupby(["method", "setting"]):
            merged = expected.merge(own, how="left", on=[*bits, *UNIT], indicator=True)
            for at, missing in merged[merged["_merge"] == "left_only"].groupby(bits, dropna=False):
                units = "; ".join(map(_unit, missing["seed"], missing["split"]))
                name = f"{verb} {mode} {method} {setting} {task} {_bits(*at)}"
                reason = f"missing, although other methods have it: {units}"
                problems.append(Problem(" ".join(name.split()), "NOT RUN", reason))
    return problems


def _columns(scores: "DataFrame") -> "dict[str, DataFrame]":
    """Return the values of each column of the comparison."""
    import pandas as pd

    # Runs of quantize.py include the float network; those of train.py are used if there are none.
    quantized, trained = (scores[scores["verb"] == verb] for verb in ("quantize", "train"))
    floats = quantized[quantized["numeric"] == "float"]
    others = trained[trained["mode"] == "float"]
    known = pd.MultiIndex.from_frame(floats[["task", "method"]])
    others = others[~pd.MultiIndex.from_frame(others[["task", "method"]]).isin(known)]
    where = ["task", "setting", "metric", "weight_bits", "activation_bits", "method", *UNIT]
    columns = {"float": pd.concat([floats, others]).drop_duplicates(where)}
    in_int8 = scores[scores["numeric"] == "int8"].groupby(["verb", "mode"])
    groups = {at: group for at, group in in_int8 if at in PROCEDURES}
    return columns | {name: groups[at] for at, name in PROCEDURES.items() if at in groups}


def _counts(counts: dict[str, float]) -> str:
    known = {name: f"{count:.0f}" for name, count in counts.items() if count == count}
    if len(set(known.values())) == 1:
        return next(iter(known.values()))
    return ", ".join(f"{name} {count}" for name, count in known.items())


def _unit(seed: object, split: object) -> str:
    import pandas as pd

    return f"seed {seed}" if pd.isna(split) else f"seed {seed} split {split}"


def _bits(weight: object, activation: object) -> str:
    import pandas as pd

    return "" if pd.isna(weight) else f"w{weight}a{activation}"
