"""Budgets of bits beside uniform widths, by size."""

from collections.abc import Callable
from pathlib import Path

from bqnn.report.__main__ import main
from bqnn.report.figures import method_colors
from bqnn.report.front import front, front_figure
from bqnn.report.runs import read_runs
from bqnn.report.summary import missing_cells

WriteRun = Callable[..., Path]


def write_runs(write_run: WriteRun, budgets: bool = True) -> None:
    """Write uniform widths 2, 4 and 8, and budgets of 3 and 5 mean bits, of two seeds."""
    for seed in (0, 1):
        forms: list[tuple[int, float | None, float]] = [(bits, None, bits) for bits in (2, 4, 8)]
        forms += [(8, mean, mean) for mean in (3.0, 5.0)] if budgets else []
        for bits, mean, size in forms:
            metrics = {"float/test/nll": 0.5, "int8/test/nll": 0.5 + 1 / size + 0.02 * seed}
            metrics |= {"int8/test/error": 0.1, "int8/test/mi": 0.01}
            budget = {"mean_bits": mean, "bytes": None, "measure": "nll"}
            quant = {"name": "default", "mode": "ptq", "weight_bits": bits, "activation_bits": 7}
            write_run(
                f"{seed}_{bits}_{mean}", metrics, seed=seed, bits=(bits, 7),
                size=int(1000 * size), quant={**quant, "budget": budget},
            )  # fmt: skip


def test_budgets_are_points_of_their_own(write_run: WriteRun, tmp_path: Path) -> None:
    write_runs(write_run)
    runs = read_runs([tmp_path / "runs"])
    assert missing_cells(runs.runs) == []
    table = front(runs.runs)
    assert table is not None
    assert list(table["bits"]) == ["w2", "mean_bits=3.0", "w4", "mean_bits=5.0", "w8"]
    assert list(table["kind"]) == ["uniform", "budget", "uniform", "budget", "uniform"]
    assert list(table["setting"]) == [""] * 5
    assert list(table["n"]) == [2] * 5
    row = table.iloc[1]
    assert (row["bytes"], round(row["test/nll"], 6)) == (3000, round(0.51 + 1 / 3, 6))
    figure = front_figure(table, method_colors(runs.scores))
    assert [axes.get_title() for axes in figure.axes] == ["nll, nats", "mi, nats"]


def test_the_report_has_the_front_only_with_budgets(write_run: WriteRun, tmp_path: Path) -> None:
    write_runs(write_run, budgets=False)
    out = tmp_path / "out"
    assert main([str(tmp_path / "runs"), "--out", str(out)]) is None
    assert not (out / "plots/digits_front.png").exists()
    for folder in (tmp_path / "runs").iterdir():
        folder.rename(tmp_path / folder.name)
    write_runs(write_run)
    assert main([str(tmp_path / "runs"), "--out", str(out)]) is None
    assert (out / "plots/digits_front.png").exists()
    assert "mean_bits=5.0" in (out / "report.md").read_text()
