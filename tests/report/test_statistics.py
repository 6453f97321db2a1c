"""Means, comparisons and paired tests against hand-computed values and scipy."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bqnn.report.paired import corrected_test, paired_differences, paired_test, remark
from bqnn.report.runs import read_runs
from bqnn.report.summary import beside_pointwise, missing_cells, summarize

WriteRun = Callable[..., Path]


def test_a_summary_is_over_seeds_and_splits(write_run: WriteRun, tmp_path: Path) -> None:
    for number, nll in enumerate((1.0, 2.0, 3.0, 6.0)):
        seed, split = divmod(number, 2)
        write_run(f"{number}", {"test/nll": nll}, seed=seed, split=split, task="yacht")
    write_run("other", {"test/nll": 5.0}, method="sghmc", split=0, task="yacht")
    bbb, sghmc = summarize(read_runs([tmp_path]).scores).to_dict("records")
    assert (bbb["n"], bbb["mean"]) == (4, 3.0)
    assert bbb["std"] == pytest.approx(math.sqrt(14 / 3))  # squares of -2, -1, 0, 3, over n - 1
    assert bbb["standard_error"] == pytest.approx(math.sqrt(14 / 3) / 2)
    assert (sghmc["n"], sghmc["mean"]) == (1, 5.0)
    assert math.isnan(sghmc["std"])


def test_a_method_is_beside_its_pointwise_counterpart(sweep: Path) -> None:
    table = beside_pointwise(read_runs([sweep]).scores)
    rows = table[(table["metric"] == "test/nll") & (table["method"] == "bbb")]
    assert list(rows["weight_bits"]) == [2, 4, 8]
    assert list(rows["n"]) == ["2"] * 3
    assert list(rows["float"]) == pytest.approx([0.45] * 3)
    assert list(rows["float, pointwise"]) == pytest.approx([0.95] * 3)
    assert list(rows["PTQ"]) == pytest.approx([0.95, 0.7, 0.575])
    assert list(rows["PTQ, pointwise"]) == pytest.approx([1.45, 1.2, 1.075])


def test_only_shared_seeds_are_set_side_by_side(write_run: WriteRun, tmp_path: Path) -> None:
    for seed, nll in enumerate((1.0, 2.0, 9.0)):
        write_run(f"b{seed}", {"test/nll": nll}, seed=seed)
        write_run(f"w{seed}", {"test/nll": nll}, seed=seed, task="wine")
    write_run("p1", {"test/nll": 4.0}, method="pointwise", seed=1)
    write_run("p7", {"test/nll": 8.0}, method="pointwise", seed=7)
    bbb, pointwise, wine = beside_pointwise(read_runs([tmp_path]).scores).to_dict("records")
    assert (bbb["n"], bbb["float"], bbb["float, pointwise"]) == ("1", 2.0, 4.0)
    assert (pointwise["n"], pointwise["float"]) == ("2", 6.0)
    assert (wine["task"], wine["n"], wine["float"]) == ("wine", "3", 4.0)  # shares none: its own
    assert math.isnan(wine["float, pointwise"])


def test_missing_runs_of_a_method_are_listed(
    sweep: Path, write_run: WriteRun, tmp_path: Path
) -> None:
    assert missing_cells(read_runs([sweep]).runs) == []
    (tmp_path / "runs/ptq/bbb_1_4/metrics.json").unlink()
    (problem,) = missing_cells(read_runs([sweep]).runs)
    assert problem.run == "quantize ptq bbb digits w4a7"
    assert problem.state == "NOT RUN"
    assert problem.reason.endswith("seed 1")


def test_paired_tests_are_those_of_scipy() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 9, 3))
    result = paired_test(a, b)
    for column in range(3):
        assert result["difference"][column] == pytest.approx(np.mean(a[:, column] - b[:, column]))
        expected = stats.ttest_rel(a[:, column], b[:, column]).pvalue
        assert result["p_t"][column] == pytest.approx(expected)
        expected = stats.wilcoxon(a[:, column], b[:, column]).pvalue
        assert result["p_wilcoxon"][column] == pytest.approx(expected)


def test_a_tie_in_one_metric_changes_no_other() -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 8, 2))
    a[0, 0] = b[0, 0]
    expected = [stats.wilcoxon(a[:, column], b[:, column]).pvalue for column in range(2)]
    assert list(paired_test(a, b)["p_wilcoxon"]) == pytest.approx(expected)


def test_a_paired_test_by_hand() -> None:
    # Differences 1, 2, 3: t = 2 / (1 / sqrt(3)), and p = 1 - t / sqrt(2 + t^2) with 2 degrees.
    result = paired_test(np.array([[2.0], [3.0], [4.0]]), np.ones((3, 1)))
    t = 2 * math.sqrt(3)
    assert (result["difference"][0], result["std"][0]) == (2.0, 1.0)
    assert result["p_t"][0] == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert result["p_wilcoxon"][0] == 0.25  # all of one sign: 2 of 8 orders


def test_a_corrected_test_by_hand() -> None:
    # As above, with t = 2 / sqrt(1/3 + 1/9) = 3. Two seeds of a split count as their mean.
    a, splits = [[2.0], [3.0], [3.5], [4.5]], [0, 1, 2, 2]
    p = corrected_test(a, [[1.0]] * 4, splits, test_share=0.1)
    assert p[0] == pytest.approx(1 - 3 / math.sqrt(2 + 9))
    scaled = corrected_test([[1e200 * value] for (value,) in a], [[1e200]] * 4, splits, 0.1)
    assert scaled[0] == pytest.approx(p[0])


@pytest.mark.parametrize(
    ("values", "splits", "share"),
    [
        ([1.0, 2.0], [0, 0], 0.1),
        ([1.0, 2.0], [0, 1], math.nan),
        ([1.0, 1.0], [0, 1], 0.1),
        ([1.0, math.inf], [0, 1], 0.1),
    ],
)
def test_a_corrected_test_that_is_impossible_is_nan(
    values: list[float], splits: list[int], share: float
) -> None:
    p = corrected_test([[value] for value in values], [[0.0]] * 2, splits, share)
    assert math.isnan(p[0])


def test_splits_have_a_corrected_p_value_and_seeds_have_none(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for number, nll in enumerate((2.0, 3.0, 4.0)):
        for method, value in (("bbb", nll), ("pointwise", 1.0)):
            metrics = {"test/nll": value, "test_share": 0.1}
            write_run(f"s{method}{number}", metrics, method=method, split=number)
            write_run(f"d{method}{number}", metrics, method=method, task="seeds", seed=number)
    table = paired_differences(read_runs([tmp_path]).scores)
    found = table[table["metric"] == "test/nll"].set_index("task")["p_corrected"].to_dict()
    assert math.isnan(found["seeds"])
    assert found["digits"] == pytest.approx(1 - 3 / math.sqrt(11))


def test_too_few_pairs_have_a_remark() -> None:
    one = paired_test(np.array([[2.0]]), np.array([[1.0]]))
    assert one["difference"][0] == 1.0
    assert all(math.isnan(one[name][0]) for name in ("std", "p_t", "p_wilcoxon"))
    assert remark(1) == "one pair: no test"
    assert remark(5).startswith("few pairs: Wilcoxon's p cannot fall below 0.0625, and t assumes")
    assert remark(6) == ""


def test_equal_values_give_neither_a_warning_nor_a_p_value() -> None:
    result = paired_test(np.ones((4, 2)), np.array([[1.0, 2.0]] * 4))
    assert list(result["difference"]) == [0.0, -1.0]
    assert np.isnan(result["p_wilcoxon"][0])
    assert result["p_wilcoxon"][1] == 0.125


def test_a_metric_that_a_run_lacks_costs_the_others_no_pair(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for seed in range(3):
        metrics = {"test/nll": 2.0 + seed, "test/mi": 1.0}
        write_run(f"b{seed}", metrics, seed=seed)
        older = {"test/nll": 1.0 + seed} if seed == 0 else {"test/nll": 1.0 + seed, "test/mi": 0.0}
        write_run(f"p{seed}", older, method="pointwise", seed=seed)
    table = paired_differences(read_runs([tmp_path]).scores)
    counts = table.set_index("metric")["n"].to_dict()
    assert counts == {"test/nll": 3, "test/mi": 2}


def test_methods_and_bits_are_compared_where_all_else_is_equal(sweep: Path) -> None:
    table = paired_differences(read_runs([sweep]).scores)
    nll = table[table["metric"] == "test/nll"]
    methods = nll[nll["kind"] == "methods"]
    assert set(zip(methods["a"], methods["b"], strict=True)) == {("bbb", "pointwise")}
    assert len(methods) == 4  # float, and at three widths
    assert list(methods["difference"]) == pytest.approx([-0.5] * 4)
    assert set(methods["n"]) == {2}

    bits = nll[(nll["kind"] == "bits") & (nll["method"] == "bbb")]
    found = {
        (row["a"], row["b"], row["weight_bits"]): row["difference"]
        for row in bits.to_dict("records")
    }
    assert found == pytest.approx(
        {
            ("int8", "float", 2): 0.5,
            ("int8", "float", 4): 0.25,
            ("int8", "float", 8): 0.125,
            ("w2a7", "w8a7", 2): 0.375,
            ("w4a7", "w8a7", 4): 0.125,
        }
    )


def test_evaluations_in_simulation_are_compared_where_there_is_no_int8(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for method, nll in (("bbb", 1.0), ("pointwise", 1.5)):
        for numeric in ("simulated", "int8"):
            bits = (4 if numeric == "simulated" else 8, 7)
            metrics = {f"{numeric}/test/nll": nll}
            write_run(f"{method}{numeric}", metrics, method=method, bits=bits, numeric=None)
    table = paired_differences(read_runs([tmp_path]).scores)
    nll = table[(table["metric"] == "test/nll") & (table["kind"] == "methods")]
    found = dict(zip(nll["weight_bits"], nll["numeric"], strict=True))
    assert found == {4: "simulated", 8: "int8"}
    assert list(nll["difference"]) == [-0.5, -0.5]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([[0.03], [0.02]], [[0.02], [0.01]]),
        ([[1.0], [2.0], [3.0]], [[0.0], [1.0], [2.0]]),
        ([[1e9 + 0.3], [0.3]], [[1e9], [0.0]]),
        ([[k / 7 + 0.1] for k in range(20)], [[k / 7] for k in range(20)]),
    ],
)
def test_equal_differences_have_no_t_test_and_say_so(a: list, b: list) -> None:
    result = paired_test(np.array(a), np.array(b))
    assert math.isnan(result["p_t"][0])
    assert result["std"][0] == 0
    assert "all differences are equal: no t test" in result["remark"][0]


def test_differences_above_rounding_are_tested() -> None:
    a, b = np.array([[0.03], [0.02], [0.05]]), np.array([[0.02], [0.01], [0.04 + 1e-9]])
    assert paired_test(a, b)["p_t"][0] == pytest.approx(stats.ttest_rel(a, b).pvalue[0], rel=1e-4)


def test_pairs_without_any_difference_have_no_test_and_say_so() -> None:
    result = paired_test(np.ones((9, 1)), np.ones((9, 1)))
    assert math.isnan(result["p_t"][0])
    assert math.isnan(result["p_wilcoxon"][0])
    assert result["remark"] == ["no pair differs: no test"]


def test_the_n_of_each_column_is_named_where_they_differ(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for seed in range(2):
        write_run(f"f{seed}", {"test/nll": 1.0}, seed=seed)
    write_run("q", {"int8/test/nll": 1.0}, bits=(4, 7), mode="qat")
    table = beside_pointwise(read_runs([tmp_path]).scores)
    counts = set(table["n"])
    assert counts == {"2", "1"}
    for seed in range(2):
        metrics = {"float/test/nll": 1.0, "int8/test/nll": 1.0}
        write_run(f"p{seed}", metrics, seed=seed, bits=(3, 7))
    write_run("p2", {"int8/test/nll": 1.0}, seed=2, bits=(3, 7))
    table = beside_pointwise(read_runs([tmp_path]).scores)
    assert set(table.loc[table["weight_bits"] == 3, "n"]) == {"float 2, PTQ 3"}


def test_a_single_trial_suggests_no_missing_runs(write_run: WriteRun, tmp_path: Path) -> None:
    for method in ("bbb", "pointwise"):
        for seed in range(3):
            write_run(f"{method}_{seed}", {"test/nll": 1.0}, method=method, seed=seed)
    write_run("trial", {"test/nll": 1.0}, seed=7, trainer={"max_epochs": 50})
    assert missing_cells(read_runs([tmp_path]).runs) == []
    (tmp_path / "runs/pointwise_1/metrics.json").unlink()
    (problem,) = missing_cells(read_runs([tmp_path]).runs)
    assert problem.reason.endswith("seed 1")


def test_one_huge_value_costs_the_other_pairs_nothing() -> None:
    a, b = np.array([[1e15 + 1], [1.0], [2.0]]), np.array([[1e15], [0.0], [0.5]])
    assert paired_test(a, b)["difference"][0] == pytest.approx(3.5 / 3)


@pytest.mark.parametrize("seed", range(5))
def test_the_signed_rank_test_with_ties_is_exact(seed: int) -> None:
    differences = np.random.default_rng(seed).integers(-3, 4, size=(8, 1)).astype(float)
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    some = differences[:, 0] != 0
    ranks = stats.rankdata(np.abs(differences[some, 0]))
    sums = np.abs((signs[:, some] * ranks).sum(1))
    seen = abs((np.sign(differences[some, 0]) * ranks).sum())
    expected = (sums >= seen - 1e-9).mean()
    assert paired_test(differences, 0 * differences)["p_wilcoxon"][0] == pytest.approx(expected)


LARGE = 1.7e308


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "a",
    [[math.inf, 1.0], [math.nan, 1.0], [math.inf] * 3, [-LARGE, LARGE, 0.0], [None, 1.0],
     [LARGE, math.nan, 2.0], [-math.inf]],
)  # fmt: skip
def test_values_that_are_not_finite_have_no_test_and_say_so(a: list) -> None:
    b = np.array([[LARGE], *([0.0] for _ in a[1:])])
    result = paired_test([[value] for value in a], b)
    assert all(math.isnan(result[name][0]) for name in ("std", "p_t", "p_wilcoxon"))
    assert result["remark"] == ["a value or a difference is not finite: no test"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [2.0**-1040, 2.0**-700, 2.0**600, 2.0**1020])
def test_a_column_of_odd_values_or_of_any_scale_changes_no_p_value(scale: float) -> None:
    a, b = np.random.default_rng(3).normal(size=(2, 9, 1)).astype(np.float16).astype(float)
    expected = paired_test(a, b)
    odd = np.full((9, 1), math.nan)
    found = paired_test(np.hstack([a * scale, odd]), np.hstack([b * scale, odd]))
    for name in ("p_t", "p_wilcoxon"):
        assert found[name][0] == pytest.approx(expected[name][0], rel=1e-6)
    assert found["std"][0] / scale == pytest.approx(expected["std"][0], rel=1e-6)
    assert found["remark"][0] == ""


@pytest.mark.filterwarnings("error")
def test_tables_without_pairs_or_columns_have_no_test() -> None:
    assert paired_test(np.ones((0, 1)), np.ones((0, 1)))["remark"] == ["no pairs: no test"]
    assert paired_test(np.ones((3, 0)), np.ones((3, 0)))["remark"] == []
    one_differs = paired_test([[1], [2], [3], [4], [5], [6]], [[1], [2], [3], [4], [5], [7]])
    assert one_differs["remark"] == ["few pairs differ: Wilcoxon's p cannot fall below 1"]


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [([[1], [2]], [[1]], ValueError), ([], [], ValueError), ([1, 2], [3, 4], ValueError),
     ([[10**400]], [[1]], ValueError), ([["x"]], [[1]], TypeError), ([[1j]], [[1]], TypeError)],
)  # fmt: skip
def test_invalid_pairs_of_tables_are_refused_in_one_line(a: list, b: list, error: type) -> None:
    with pytest.raises(error, match=r"^(a|b) [^\n]*(give|pair)[^\n]*$"):
        paired_test(a, b)
