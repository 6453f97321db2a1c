"""Paired differences over seeds and splits, between methods and between bit widths."""

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any

from bqnn.report.runs import CELL, UNIT
from bqnn.report.summary import BASELINE, executed

if TYPE_CHECKING:
    from pandas import DataFrame

FEW = 6  # with fewer pairs, the p value of Wilcoxon's test cannot fall below 0.05


def paired_differences(scores: "DataFrame") -> "DataFrame":
    """Compare two methods, or two bit widths, over seeds and splits.

    Methods are compared at equal bits. Quantized networks are compared with their float network,
    and with the most bits of their sweep.

    Args:
        scores: The scores of `Runs`.

    Returns:
        A row for each comparison and metric. It has the mean and the standard deviation of a - b
        over the n seeds and splits that both sides have, the p values of `paired_test` and
        `corrected_test` (not corrected for multiple tests), and the remark.
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
    """Test paired values for differences, by the t test and by Wilcoxon's signed-rank test.

    Differences are first rounded to the resolution of their operands in float64. A p value is NaN
    if the test is impossible: both with a single pair or with a value, difference or deviation that
    is not finite; Wilcoxon's if no pair differs; t if all differences are equal, because their
    deviation is then 0 or a rounding error.

    Args:
        a: Real numbers [n, M]: n pairs of M metrics.
        b: Real numbers [n, M].

    Returns:
        The number of pairs `n`, and for each metric the mean of a - b (`difference`), its standard
        deviation (`std`), the two-sided p values `p_t` and `p_wilcoxon`, and `remark`, which says
        why a test is missing or weak.

    Raises:
        TypeError: An array has values that are not real numbers.
        ValueError: The shapes differ, or are not [n, M].

    Examples:
        >>> result = paired_test([[0.5], [0.6], [0.8]], [[0.4], [0.4], [0.5]])
        >>> print(result["n"], result["difference"].round(3), result["p_t"].round(3))
        3 [0.2] [0.074]
        >>> result["remark"]
        ["few pairs: Wilcoxon's p cannot fall below 0.25, and t assumes normal differences"]
    """
    import numpy as np
    from scipy.special import stdtr  # scipy.stats takes half a second to import

    a, b = _table("a", a), _table("b", b)
    if a.shape != b.shape:
        raise ValueError(
            f"a is [{_shape(a)}] and b [{_shape(b)}]: every value needs a pair; give both as [n, "
            "M], with a row for each pair"
        )
    n, columns = a.shape
    result: dict[str, Any] = {"n": n}
    for name in ("difference", "std", "p_t", "p_wilcoxon"):
        result[name] = np.full(columns, np.nan)
    if n == 0:
        return result | {"remark": [remark(0)] * columns}
    with np.errstate(all="ignore"):  # an overflow gives infinity or NaN, which is checked below
        differences, varies = _differences(a, b)
        # Without the scale, squares of very large or small differences would leave float64.
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
        result["p_t"][tested] = 2 * stdtr(n - 1, -t)
        for column in ((differing > 0) & is_finite).nonzero()[0]:
            result["p_wilcoxon"][column] = _signed_rank_p(differences[:, column])
    each = zip(differing, varies, is_finite, strict=True)
    return result | {"remark": [remark(n, *of_column) for of_column in each]}


def corrected_test(a: Any, b: Any, splits: Any, test_share: float) -> Any:
    """Test paired values over random splits of one data set, whose training rows overlap.

    It is the corrected resampled t test of Nadeau and Bengio (*Inference for the Generalization
    Error*, 2003). Differences d_j are first averaged over the seeds of a split. For J splits,

        t = mean d / sqrt((1 / J + n_test / n_train) var d)

    has J - 1 degrees of freedom. The plain t test has 1 / J only, as if the splits were
    independent data sets.

    Args:
        a: Real numbers [n, M]: n pairs of M metrics.
        b: Real numbers [n, M].
        splits: The split of each pair [n].
        test_share: The share of all rows that a split tests, in (0, 1).

    Returns:
        The two-sided p values [M]. NaN with fewer than two splits, without a share, where all
        differences are equal, and where a value is not finite.

    Examples:
        >>> values = [[0.5], [0.6], [0.8], [0.7]]
        >>> corrected_test(values, [[0.4]] * 4, [0, 1, 2, 3], 0.1).round(3)
        array([0.048])
    """
    import numpy as np
    from scipy.special import stdtr

    a, b = _table("a", a), _table("b", b)
    names = np.unique(np.asarray(splits))
    p_values = np.full(a.shape[1], np.nan)
    if len(names) < 2 or not 0 < test_share < 1:
        return p_values
    with np.errstate(all="ignore"):  # an overflow gives infinity or NaN, which is checked below
        differences, varies = _differences(a, b)
        scale = np.abs(differences).max(0)
        differences = differences / np.where(scale > 0, scale, 1)
        means = np.stack([differences[np.asarray(splits) == name].mean(0) for name in names])
        variance = (1 / len(names) + test_share / (1 - test_share)) * means.var(0, ddof=1)
        t = np.abs(means.mean(0)) / np.sqrt(variance)
    tested = varies & np.isfinite(t)
    p_values[tested] = 2 * stdtr(len(names) - 1, -t[tested])
    return p_values


def remark(
    n: int, differing: int | None = None, varies: bool = True, is_finite: bool = True
) -> str:
    """Explain why tests of n pairs are missing or weak.

    Args:
        n: The number of pairs.
        differing: The number of pairs that differ; None for all.
        varies: Whether the differences are not all equal.
        is_finite: Whether all values, their differences and their deviation are finite in float64.

    Returns:
        The explanation, which is empty if both tests are fine.

    Examples:
        >>> remark(1)
        'one pair: no test'
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
        t_test = ", and t assumes normal differences" if varies and n < FEW else ""
        remarks.append(f"{few}: Wilcoxon's p cannot fall below {2 / 2**differing:.3g}{t_test}")
    return "; ".join(remarks)


def _table(name: str, values: Any) -> Any:
    """Convert values to an array [n, M] of float64."""
    import numpy as np

    given = np.asarray(values)
    if given.ndim != 2:
        raise ValueError(
            f"{name} is [{_shape(given)}]: give a table [n, M], with a row for each pair and a "
            "column for each metric"
        )
    try:
        if given.dtype.kind not in "biufO":
            raise TypeError
        return given.astype(float)
    except (TypeError, ValueError):
        raise TypeError(f"{name} has values that are not real numbers; give floats") from None
    except OverflowError:
        raise ValueError(f"{name} has a number beyond float64; give it in another unit") from None


def _shape(table: Any) -> str:
    return ", ".join(map(str, table.shape))


def _signed_rank_p(differences: Any) -> float:
    """Compute the two-sided p value of Wilcoxon's signed-rank test, exact up to 50 pairs.

    scipy gives the same value, but with ties it tries all 2^n signs in Python, which takes seconds.
    This function builds the distribution of the sum of positive ranks rank by rank.
    """
    import numpy as np

    some = differences[differences != 0]
    if len(some) > 50:
        from scipy import stats

        return float(stats.wilcoxon(some).pvalue)
    _, places, counts = np.unique(np.abs(some), return_inverse=True, return_counts=True)
    ranks = (2 * counts.cumsum() - counts + 1)[places]  # doubled: ties have half ranks
    ways = np.zeros(ranks.sum() + 1)
    ways[0] = 1
    for rank in ranks:
        ways[rank:] += ways[: len(ways) - rank].copy()
    sums = 2 * np.arange(len(ways)) - ranks.sum()  # centered at 0
    observed = 2 * ranks[some > 0].sum() - ranks.sum()
    return float(ways[np.abs(sums) >= abs(observed)].sum() / ways.sum())


def _differences(a: Any, b: Any) -> tuple[Any, Any]:
    """Compute a - b at the resolution of the operands, and which columns vary beyond it."""
    import numpy as np

    largest = np.maximum(np.abs(a), np.abs(b))
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 51, -1074)
    step = np.ldexp(1.0, np.maximum(exponent, -1074))  # 4 units in the last place
    differences = np.round((a - b) / step) * step
    low, high = (differences - step).max(0), (differences + step).min(0)
    return differences, low > high


Comparison = tuple[str, dict[str, Any], str, str, "DataFrame"]


def _methods(scores: "DataFrame") -> Iterator[Comparison]:
    """Yield pairs of methods with the same bits; the table has a column per (method, metric)."""
    import pandas as pd

    place = [name for name in CELL if name != "method"]
    # Runs of quantize.py repeat the float network at all bit widths.
    floats = scores[(scores["numeric"] == "float") & (scores["verb"] != "quantize")]
    kept = pd.concat([floats, executed(scores)])
    for at, group in kept.groupby([*place, "numeric"], dropna=False):
        methods = sorted(set(group["method"]), key=lambda name: (name != BASELINE, name))
        table = group.pivot(index=UNIT, columns=["method", "metric"], values="value")
        where = dict(zip([*place, "numeric"], at, strict=True)) | _test_share(group)
        for b, a in combinations(methods, 2):
            yield "methods", where, a, b, table


def _against_float(scores: "DataFrame") -> Iterator[Comparison]:
    """Yield int8 and float of the same run."""
    quantized = scores[(scores["verb"] == "quantize") & scores["numeric"].isin(["float", "int8"])]
    for at, group in quantized.groupby(CELL, dropna=False):
        table = group.pivot(index=UNIT, columns=["numeric", "metric"], values="value")
        where = dict(zip(CELL, at, strict=True)) | {"numeric": "int8"} | _test_share(group)
        yield "bits", where, "int8", "float", table


def _widths(scores: "DataFrame") -> Iterator[Comparison]:
    """Yield fewer bits and the most bits of each sweep over one of the two widths."""
    for axis, fixed in (("weight_bits", "activation_bits"), ("activation_bits", "weight_bits")):
        place = [*(name for name in CELL if name != axis), "numeric"]
        for at, group in executed(scores).groupby(place, dropna=False):
            table = group.pivot(index=UNIT, columns=[axis, "metric"], values="value")
            most = group[axis].max()
            for fewer in sorted(set(group[axis]) - {most}):
                where = dict(zip(place, at, strict=True)) | {axis: fewer} | _test_share(group)
                names = {bits: _width(axis, bits, where[fixed]) for bits in (fewer, most)}
                pair = table[[fewer, most]].rename(columns=names, level=0)
                yield "bits", where, names[fewer], names[most], pair


def _test_share(scores: "DataFrame") -> dict[str, float]:
    """Return the share of test rows, the same for all splits of a task; NaN if no run has it."""
    return {"test_share": float(scores["test_share"].median())}


def _width(axis: str, bits: int, fixed: int) -> str:
    return f"w{bits}a{fixed}" if axis == "weight_bits" else f"w{fixed}a{bits}"


def _compare(
    kind: str, place: dict[str, Any], a: str, b: str, table: "DataFrame"
) -> Iterator[dict[str, Any]]:
    """Yield a row for each metric of both sides. Metrics with the same pairs share one test."""
    import numpy as np

    if a not in table or b not in table:
        return
    ours, theirs = table[a], table[b]
    metrics = [name for name in ours if name in theirs]
    left, right = ours[metrics].to_numpy(), theirs[metrics].to_numpy()
    there = ours[metrics].notna().to_numpy() & theirs[metrics].notna().to_numpy()
    columns = [column for column in range(len(metrics)) if there[:, column].any()]
    for shared in _by_value(columns, lambda column: there[:, column].tobytes()).values():
        at = np.ix_(there[:, shared[0]], shared)
        result = paired_test(left[at], right[at])
        splits = table.index.get_level_values("split")[there[:, shared[0]]]
        if splits.notna().all():
            share = place["test_share"]
            result["p_corrected"] = corrected_test(left[at], right[at], splits, share)
        names = [metrics[column] for column in shared]
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


def _by_value(columns: list[int], value: Callable[[int], Any]) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for column in columns:
        groups.setdefault(value(column), []).append(column)
    return groups
