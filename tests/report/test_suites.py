"""Evaluations on distorted images and other data are shown with the right means."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bqnn.report.__main__ import main
from bqnn.report.figures import method_colors, size_figure
from bqnn.report.runs import read_runs
from bqnn.report.suite_figures import level_figures, ood_figure, suite_runs

WriteRun = Callable[..., Path]


@pytest.fixture
def suites(write_run: WriteRun, tmp_path: Path) -> Path:
    """Write two methods and two seeds: NLL is seed + level, and 10 more for pointwise."""
    for method, more in (("bbb", 0.0), ("pointwise", 10.0)):
        for seed in range(2):
            metrics = {"test/nll": more + seed, "test/ape": 0.1, "ood/uniform/ape": 1.0}
            metrics |= {"ood/uniform/auroc_entropy": 0.9}
            metrics |= {
                f"shift/{kind}_{level}/nll": more + seed + level
                for kind in ("rotation", "noise")
                for level in range(1, 6)
            }
            write_run(
                f"{method}{seed}", metrics, method=method, seed=seed, numeric=None,
                checkpoint="a/checkpoint.ckpt",
            )  # fmt: skip
    return tmp_path / "runs"


def test_curves_against_level_start_at_the_test_set(suites: Path) -> None:
    scores = read_runs([suites]).scores
    (runs,) = suite_runs(scores)
    ((name, figure),) = level_figures(runs, method_colors(scores))
    assert name == "nll"
    assert [axes.get_title() for axes in figure.axes] == ["noise", "rotation"]
    bbb, pointwise = figure.axes[0].lines
    assert list(bbb.get_xdata()) == [0, 1, 2, 3, 4, 5]
    assert list(bbb.get_ydata()) == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    assert list(pointwise.get_ydata()) == [value + 10 for value in bbb.get_ydata()]


def test_detection_has_a_panel_and_uncertainty_is_beside_the_test_set(suites: Path) -> None:
    scores = read_runs([suites]).scores
    (runs,) = suite_runs(scores)
    figure = ood_figure(runs, method_colors(scores))
    assert figure is not None
    auroc, ape = figure.axes
    assert [label.get_text() for label in auroc.get_xticklabels()] == ["uniform"]
    assert [label.get_text() for label in ape.get_xticklabels()] == ["test", "uniform"]


def test_the_page_shows_them_and_has_no_empty_sections(suites: Path, tmp_path: Path) -> None:
    assert main([str(suites), "--out", str(tmp_path / "out")]) is None
    text = (tmp_path / "out/report.md").read_text()
    assert "### Shift and other data (float)" in text
    assert "plots/digits_float_shift_nll.png" in text
    assert "plots/digits_float_ood.png" in text
    assert "Against size" not in text
    assert "beside the pointwise" not in text  # evaluations of trained networks have no column


def test_without_pointwise_runs_there_is_no_comparison_with_them(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_run("a", {"test/nll": 1.0})
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) is None
    text = (tmp_path / "out/report.md").read_text()
    assert "### Means" in text
    assert "beside the pointwise" not in text


def test_ptq_and_qat_have_marks_of_their_own(write_run: WriteRun, tmp_path: Path) -> None:
    for mode in ("ptq", "qat"):
        metrics = {"int8/test/error": 0.1, "float/test/error": 0.1}
        write_run(mode, metrics, mode=mode, bits=(4, 7), size=100)
    runs = read_runs([tmp_path])
    figure = size_figure(runs.runs, method_colors(runs.scores))
    assert figure is not None
    marks = {line.get_label(): line.get_marker() for line in figure.axes[0].lines}
    assert marks["bbb ptq"] != marks["bbb qat"]
    assert "o" not in (marks["bbb ptq"], marks["bbb qat"])  # circles are float
