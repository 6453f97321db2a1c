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
    of t where all differences are equal, since their deviation is then 0 or a rounding error, and
    of both where a value, a difference or the deviation is not finite. `remark` says why, a text
    per column. Differences are rounded to what their operands can resolve in float64 first.

    Raises:
        TypeError: They hold other things than real numbers.
        ValueError: They differ in shape, or are no tables.
    """
    import numpy as np
    from scipy import stats

    a, b = _table("a", a), _table("b", b)
    if a.shape != b.shape:
        raise ValueError(
            f"a is [{_shape(a)}] and b [{_shape(b)}]: every value needs its pair; give both as [n, "
            "M], a row for each pair"
        )
    n, columns = a.shape
    result: dict[str, Any] = {"n": n}
    for name in ("difference", "std", "p_t", "p_wilcoxon"):
        result[name] = np.full(columns, np.nan)
    if n == 0:
        return result | {"remark": [remark(0)] * columns}
    with np.errstate(all="ignore"):  # what leaves float64 on the way becomes infinite, or NaN
        differences, varies = _differences(a, b)
        # Squares of very large and very small differences would leave float64, but for the scale.
        scale = np.abs(differences).max(0)
        scale[scale == 0] = 1
        scaled = differences / scale
        result["difference"] = scaled.mean(0) * scale
        if n >= 2:
            std = np.where(varies, scaled.std(0, ddof=1), 0.0)
            result["std"] = std * scale
    differing = (differences != 0).sum(0)
    is_finite = np.isfinite(differences).all(0) & (np.isfinite(result["std"]) | (n < 2))
    if n >= 2:
        result["std"][~is_finite] = np.nan
        tested = varies & is_finite
        t = np.abs(scaled.mean(0)[tested]) / (std[tested] / math.sqrt(n))
        result["p_t"][tested] = 2 * stats.t.sf(t, n - 1)
        for column in ((differing > 0) & is_finite).nonzero()[0]:
            result["p_wilcoxon"][column] = _signed_rank_p(differences[:, column])
    each = zip(differing, varies, is_finite, strict=True)
    return result | {"remark": [remark(n, *of_column) for of_column in each]}


def remark(
    n: int, differing: int | None = None, varies: bool = True, is_finite: bool = True
) -> str:
    """What the tests of n pairs cannot say; empty where they can.

    Args:
        n: The number of pairs.
        differing: How many of them differ; all, unless given.
        varies: Whether the differences are not all equal.
        is_finite: Whether float64 has all values, their differences and their deviation.
    """
    differing = n if differing is None else differing
    if n < 1:
        return "no pairs: no test"
    if not is_finite:
        return "a value or a difference is not finite: no test"
    if n < 2:
        return "one pair: no test"
    if not differing:
        return "no pair differs: no test"
    remarks = [] if varies else ["all differences are equal: no t test"]
    if differing < FEW:
        few = "few pairs" if n < FEW else "few pairs differ"
        t_test = ", and t rests on normal differences" if varies and n < FEW else ""
        remarks.append(f"{few}: Wilcoxon's p cannot fall below {2 / 2**differing:.3g}{t_test}")
    return "; ".join(remarks)


def _table(name: str, values: Any) -> Any:
    """The values as an array [n, M] of float64."""
    import numpy as np

    given = np.asarray(values)
    if given.ndim != 2:
        raise ValueError(
            f"{name} is [{_shape(given)}]: give a table [n, M], a row for each pair and a column "
            "for each metric"
        )
    try:
        if given.dtype.kind not in "biufO":
            raise TypeError
        return given.astype(float)
    except (TypeError, ValueError):
        raise TypeError(f"{name} holds other things than real numbers; give floats") from None
    except OverflowError:
        raise ValueError(f"{name} has a number beyond float64; give it in another unit") from None


def _shape(table: Any) -> str:
    return ", ".join(map(str, table.shape))


def _signed_rank_p(differences: Any) -> float:
    """Two-sided p value of Wilcoxon's signed-rank test: exact up to 50 pairs, ties included.

    scipy gives the same, but where there are ties it tries all 2^n signs in Python, which takes
    seconds. Here the distribution of the sum of positive ranks is built rank by rank.
    """
    import numpy as np
    from scipy import stats

    some = differences[differences != 0]
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
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 51, -1074)  # that of a zero is 0
    step = np.ldexp(1.0, np.maximum(exponent, -1074))  # 4 units in the last place
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
