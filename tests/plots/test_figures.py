"""Figures are written completely as PNG, and show the given numbers."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from bqnn.plots.figures import (
    confidence_histogram,
    curves,
    interval_calibration,
    panels,
    regression_fit,
    reliability_diagram,
    risk_coverage,
    save,
    score_histograms,
    synthetic_fit,
    weight_grids,
)

PNG_SIGNATURE, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def classified() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    probabilities = (2 * torch.randn(300, 4, generator=generator)).softmax(-1)
    return probabilities, torch.randint(4, (300,), generator=generator)


def regressed(num_rows: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean, noise = torch.randn(2, num_rows, generator=generator)
    return mean, torch.full((num_rows,), 0.5), mean + 0.5 * noise


def synthetic() -> Figure:
    x = torch.linspace(-1, 1, 50)
    summary = dict.fromkeys(("mean", "aleatoric_std", "epistemic_std", "std"), x**2 + 0.1)
    return synthetic_fit(x[:, None], summary, x**2, 0.1 + 0 * x, x[::5], x[::5] ** 2)


DRAWN: dict[str, Callable[[], Figure]] = {
    "reliability": lambda: reliability_diagram(*classified()),
    "confidence": lambda: confidence_histogram(*classified()),
    "interval": lambda: interval_calibration(*regressed()),
    "regression": lambda: regression_fit(*regressed()),
    "synthetic": synthetic,
    "scores": lambda: score_histograms({"$\\frac{$": torch.rand(50), "test": torch.rand(50)}, "x"),
    "weights": lambda: weight_grids([("$a_{$", torch.randn(50), torch.randint(-8, 8, (50,)))]),
}


def labels(figure: Figure) -> set[str]:
    return {label for axes in figure.axes for label in (axes.get_xlabel(), axes.get_ylabel())}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_are_written_as_whole_pngs(name, tmp_path):
    content = save(DRAWN[name](), tmp_path / "new" / f"{name}.png").read_bytes()
    assert content.startswith(PNG_SIGNATURE)
    assert content.endswith(PNG_END)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"{name}.png"]


@pytest.mark.parametrize("name", DRAWN)
def test_labels_are_plain_text_whatever_names_hold(name):
    figure = DRAWN[name]()
    figure.draw_without_rendering()
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert not [text for text in texts if "mathdefault" in text]


def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = save(Figure(), tmp_path / "figure.png")
    before = path.read_bytes()

    def write_half(self: Figure, file: Path, **settings: object) -> None:
        file.write_bytes(before[:20])
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", write_half)
    with pytest.raises(OSError, match="disk full"):
        save(Figure(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_curves_share_a_panel_between_train_and_val_and_skip_empty_cells(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "epoch,step,train/loss,train/nll,val/nll,val/error,test/nll\n"
        "0,9,3.0,2.0,,,\n"
        "0,9,,,1.5,0.25,\n"
        "1,19,2.0,1.0,,,\n"
        "2,29,1.0,,nan,0.125,\n"
        "2,29,,,,,0.5\n"
    )
    figure = curves(path)
    drawn = {
        axes.get_title(): {str(line.get_label()): line.get_xydata().tolist() for line in axes.lines}
        for axes in figure.axes
    }
    assert list(drawn) == ["loss", "nll", "error"]
    assert drawn["loss"] == {"train": [[0, 3], [1, 2], [2, 1]]}
    assert drawn["nll"]["train"] == [[0, 2], [1, 1]]
    assert drawn["nll"]["val"][0] == [0, 1.5]
    assert drawn["error"] == {"val": [[0, 0.25], [2, 0.125]]}
    assert "epoch" in labels(figure)
    assert save(figure, tmp_path / "curves.png").exists()


@pytest.mark.parametrize("text", ["", "epoch,train/loss\n", "step,train/loss\n1,2\n", "epoch\n1\n"])
def test_curves_refuse_a_file_with_nothing_to_draw(text, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="no rows with an epoch"):
        curves(path)


def test_reliability_diagram_has_the_bins_and_the_calibration_error():
    # 0.75 right and 0.75 wrong: one bin of accuracy 0.5 and gap 0.25, and ECE 25 %.
    figure = reliability_diagram(torch.tensor([[0.75, 0.25]]).expand(2, 2), torch.tensor([0, 1]))
    diagram, counts = figure.axes
    accuracy, gap = diagram.patches
    assert diagram.get_title() == "ECE 25.00 %"
    assert accuracy.get_height() == 0.5  # type: ignore[attr-defined]
    assert (gap.get_y(), gap.get_height()) == (0.5, 0.25)  # type: ignore[attr-defined]
    assert [bar.get_height() for bar in counts.patches] == [2]  # type: ignore[attr-defined]
    assert {"accuracy", "confidence"} <= labels(figure)


def test_confidence_histogram_counts_right_and_wrong():
    probabilities, targets = classified()
    right = int((probabilities.argmax(-1) == targets).sum())
    figure = confidence_histogram(probabilities, targets)
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == [f"correct ({right})", f"wrong ({300 - right})"]
    assert "confidence" in labels(figure)


def test_histogram_is_drawn_when_nothing_is_wrong():
    figure = confidence_histogram(torch.eye(3), torch.arange(3))
    assert figure.axes[0].get_legend().get_texts()[1].get_text() == "wrong (0)"


def test_interval_calibration_shows_nineteen_levels():
    figure = interval_calibration(*regressed())
    (model,) = [line for line in figure.axes[0].lines if line.get_label() == "model"]
    assert len(model.get_xdata()) == 19
    assert {"nominal coverage", "empirical coverage"} <= labels(figure)


@pytest.mark.parametrize(("num_rows", "num_shown"), [(1, 1), (300, 300), (2000, 500)])
def test_regression_fit_shows_at_most_500_rows(num_rows, num_shown):
    figure = regression_fit(*regressed(num_rows))
    points = [c.lines[0] for c in figure.axes[0].containers]  # type: ignore[attr-defined]
    assert sum(len(line.get_xdata()) for line in points) == num_shown
    assert {"target", "prediction"} <= labels(figure)


def test_synthetic_fit_shows_mean_truth_bands_and_data():
    fit, parts = synthetic().axes
    texts = {text.get_text() for text in fit.get_legend().get_texts()}
    assert {"predictive mean", "truth", "training data", "total, ±2 std"} <= texts
    assert {"epistemic, ±2 std", "aleatoric, ±2 std"} <= texts
    assert len(fit.collections) == 3  # two bands and the data
    assert len(parts.lines) == 4
    assert (fit.get_ylabel(), parts.get_xlabel(), parts.get_ylabel()) == ("y", "x", "std")


def test_plots_import_no_matplotlib_until_a_figure_is_drawn_and_never_pyplot():
    code = (
        "import sys, torch, bqnn.plots.figures as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.confidence_histogram(torch.eye(3), torch.arange(3))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_drawing_leaves_the_global_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    interval_calibration(*regressed())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("size", [1e-300, 1e60, 1e300, 1.7e308, float("inf"), float("nan")])
def test_numbers_of_any_size_are_drawn(size: float, tmp_path: Path) -> None:
    values = torch.rand(20, dtype=torch.float64)
    values[::3] *= size
    points = [(float(x), float(value)) for x, value in enumerate(values)]
    figures = [
        regression_fit(values, values.abs(), -values),
        interval_calibration(values, values.abs(), -values),
        risk_coverage({"std": values}, "squared error"),
        score_histograms({"test": values, "ood/far": values.flip(0)}, "std"),
        score_histograms({"test": values[:1]}, "std"),
        panels({"nll": {"train": points, "val": points[:1]}}, "epoch"),
    ]
    for number, figure in enumerate(figures):
        assert save(figure, tmp_path / f"{number}.png").stat().st_size > 1000


def test_matplotlib_does_not_warn_about_a_read_only_home(tmp_path: Path) -> None:
    code = (
        "import logging; logging.basicConfig(level=logging.INFO); "
        "from bqnn.plots.figures import panels, save; "
        "save(panels({'nll': {'val': [(0.0, 1.0)]}}, 'epoch'), 'a.png')"
    )
    environment = {n: v for n, v in os.environ.items() if n not in ("MPLCONFIGDIR", "HOME")}
    environment |= {"HOME": os.devnull + "/home", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= dict.fromkeys(("XDG_CONFIG_HOME", "XDG_CACHE_HOME"), os.devnull + "/xdg")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "a.png").exists()
