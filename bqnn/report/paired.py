"""Paired differences over seeds and splits, between methods and between bit widths."""

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any

from bqnn.report.runs import CELL, UNIT
from bqnn.report.summary import BASELINE, executed

if TYPE_CHECKING:
    from pandas import DataFrame

FEW = 6  # below it, Wilcoxon's test cannot fall below 0.05, whatever the data


def paired_differences(scores: "DataFrame") -> "DataFrame":
    """What two methods, or two numbers of bits, differ by where all else is equal.

    scores: as in `Runs`. Methods are compared at equal bits; quantized networks with their own
    float one, and with the most bits of their sweep. A row has the mean of a - b over the n
    seeds and splits that both have, their standard deviation, p values of the paired t test and
    of Wilcoxon's signed-rank test (two-sided, not corrected for their number), and a remark
    where n is too small for them.
    """
    import pandas as pd

    rows = [
        row
        for of_kind in (_methods(scores), _against_float(scores), _widths(scores))
        for kind, place, a, b, table in of_kind
        for row in _compare(kind, place, a, b, table)
    ]
    return pd.DataFrame(rows)


def paired_test(a: Any, b: Any) -> dict[str, Any]:
    """Two arrays [n, M] of paired values: differences and p values of each of the M columns.

    A p value is NaN where there is no test: of a single pair, of Wilcoxon where no pair differs,
    and of t where all differences are equal, since their deviation is then 0 or a rounding
    error. `remark` says why, a text per column. Differences are rounded to what their operands
    can resolve in float64 first.
    """
    import numpy as np
    from scipy import stats

    n = len(a)
    with np.errstate(all="ignore"):  # values at the end of float64 give infinity, and no test
        differences, varies = _differences(np.asarray(a, dtype=float), np.asarray(b, dtype=float))
        result: dict[str, Any] = {"n": n, "difference": differences.mean(0)}
    for name in ("std", "p_t", "p_wilcoxon"):
        result[name] = np.full(differences.shape[1], np.nan)
    varies &= np.isfinite(differences).all(0)
    some = (differences != 0).any(0)
    if n >= 2:
        with np.errstate(all="ignore"):
            result["std"] = np.where(varies, differences.std(0, ddof=1), 0.0)
        if varies.any():
            result["p_t"][varies] = stats.ttest_1samp(differences[:, varies], 0).pvalue
        for column in some.nonzero()[0]:
            result["p_wilcoxon"][column] = _signed_rank_p(differences[:, column])
    result["remark"] = [remark(n, *which) for which in zip(varies, some, strict=True)]
    return result


def remark(n: int, varies: bool = True, some: bool = True) -> str:
    """What the tests of n pairs cannot say; empty where they can.

    varies: whether the differences are not all equal; some: whether any is not zero.
    """
    if n < 2:
        return "one pair: no test"
    remarks = []
    if not some:
        return "no pair differs: no test"
    if not varies:
        remarks.append("all differences are equal: no t test")
    if n < FEW:
        t_test = ", and t rests on normal differences" if varies else ""
        remarks.append(f"few pairs: Wilcoxon's p cannot fall below {2 / 2**n:.3g}{t_test}")
    return "; ".join(remarks)


def _signed_rank_p(differences: Any) -> float:
    """Two-sided p value of Wilcoxon's signed-rank test: exact up to 50 pairs, ties included.

    scipy gives the same, but where there are ties it tries all 2^n signs in Python, which takes
    seconds. Here the distribution of the sum of positive ranks is built rank by rank.
    """
    import numpy as np
    from scipy import stats

    some = differences[differences != 0]
    if not np.isfinite(some).all():
        return math.nan
    if len(some) > 50:
        return float(stats.wilcoxon(some).pvalue)
    ranks = (2 * stats.rankdata(np.abs(some))).astype(int)  # doubled: those of ties are halves
    ways = np.zeros(ranks.sum() + 1)
    ways[0] = 1
    for rank in ranks:
        ways[rank:] += ways[: len(ways) - rank].copy()
    sums = 2 * np.arange(len(ways)) - ranks.sum()  # around their mean, 0
    seen = 2 * ranks[some > 0].sum() - ranks.sum()
    return float(ways[np.abs(sums) >= abs(seen)].sum() / ways.sum())


def _differences(a: Any, b: Any) -> tuple[Any, Any]:
    """a - b, each rounded to what its operands can resolve, and which columns vary beyond that."""
    import numpy as np

    largest = np.maximum(np.abs(a), np.abs(b))
    step = np.ldexp(1.0, np.maximum(np.frexp(largest)[1] - 51, -1000))  # 4 units in the last place
    differences = np.round((a - b) / step) * step
    low, high = (differences - step).max(0), (differences + step).min(0)
    return differences, low > high


Comparison = tuple[str, dict[str, Any], str, str, "DataFrame"]


def _methods(scores: "DataFrame") -> Iterator[Comparison]:
    """Pairs of methods with the same bits; the table has a column per (method, metric)."""
    import pandas as pd

    place = [name for name in CELL if name != "method"]
    # A float network is in the runs of all bits that it was quantized to.
    floats = scores[(scores["numeric"] == "float") & (scores["verb"] != "quantize")]
    kept = pd.concat([floats, executed(scores)])
    for at, group in kept.groupby([*place, "numeric"], dropna=False):
        methods = sorted(set(group["method"]), key=lambda name: (name != BASELINE, name))
        table = group.pivot(index=UNIT, columns=["method", "metric"], values="value")
        for b, a in combinations(methods, 2):
            yield "methods", dict(zip([*place, "numeric"], at, strict=True)), a, b, table


def _against_float(scores: "DataFrame") -> Iterator[Comparison]:
    """int8 and float of the same run."""
    quantized = scores[(scores["verb"] == "quantize") & scores["numeric"].isin(["float", "int8"])]
    for at, group in quantized.groupby(CELL, dropna=False):
        table = group.pivot(index=UNIT, columns=["numeric", "metric"], values="value")
        where = dict(zip(CELL, at, strict=True)) | {"numeric": "int8"}
        yield "bits", where, "int8", "float", table


def _widths(scores: "DataFrame") -> Iterator[Comparison]:
    """Fewer bits and the most bits of a sweep over one of the two widths."""
    for axis, fixed in (("weight_bits", "activation_bits"), ("activation_bits", "weight_bits")):
        place = [*(name for name in CELL if name != axis), "numeric"]
        for at, group in executed(scores).groupby(place, dropna=False):
            table = group.pivot(index=UNIT, columns=[axis, "metric"], values="value")
            most = group[axis].max()
            for fewer in sorted(set(group[axis]) - {most}):
                where = dict(zip(place, at, strict=True)) | {axis: fewer}
                names = {bits: _width(axis, bits, where[fixed]) for bits in (fewer, most)}
                pair = table[[fewer, most]].rename(columns=names, level=0)
                yield "bits", where, names[fewer], names[most], pair


def _width(axis: str, bits: int, fixed: int) -> str:
    return f"w{bits}a{fixed}" if axis == "weight_bits" else f"w{fixed}a{bits}"


def _compare(
    kind: str, place: dict[str, Any], a: str, b: str, table: "DataFrame"
) -> Iterator[dict[str, Any]]:
    """A row for each metric that both sides have, metrics of the same pairs tested together."""
    if a not in table or b not in table:
        return
    there = table[a].notna() & table[b].notna()  # a metric that only one side has is False
    metrics = [name for name in table[a] if there[name].any()]
    for pairs, names in _by_value(metrics, lambda name: tuple(there[name])).items():
        rows = table.loc[list(pairs)]
        result = paired_test(rows[a][names].to_numpy(), rows[b][names].to_numpy())
        n = result.pop("n")
        for number, name in enumerate(names):
            yield {
                "kind": kind,
                **{key: place.get(key) for key in (*CELL, "numeric")},
                "metric": name,
                "a": a,
                "b": b,
                "n": n,
                **{key: column[number] for key, column in result.items()},
            }


def _by_value(names: list[str], value: Callable[[str], Any]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for name in names:
        groups.setdefault(value(name), []).append(name)
    return groups
