"""What an evaluation leaves in its folder beyond what every run does: files, pictures, a table."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bqnn.data.distortions import DISTORTIONS
from bqnn.evaluation.results import text_table
from bqnn.evaluation.suite import Findings, Prediction, distortions_in
from bqnn.files import write_csv, written_beside
from bqnn.inference.likelihoods import Regression
from bqnn.plots import figures as plots

TABLE = ("error", "nll", "ape", "mi", "ece", "rmse", "std", "epistemic_std")
DETECTION = ("auroc_entropy", "auroc_mi", "auroc_std")


def write_uncertainty(folder: Path, predictions: Mapping[str, Prediction]) -> None:
    """uncertainty.npz: what is predicted for each row of each set, and how sure it is.

    For each set, `<set>/targets` where it has any, and everything in `Likelihood.summary`: class
    probabilities (float32), entropy and its parts, or a mean and its standard deviations
    (float64, whose range original units may need).
    """
    arrays = {}
    for name, each in predictions.items():
        if each.targets is not None:
            arrays[f"{name}/targets"] = each.targets.numpy()
        for key, values in each.summary.items():
            arrays[f"{name}/{key}"] = (values.float() if values.dim() > 1 else values).numpy()
    with written_beside(folder / "uncertainty.npz") as beside, beside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def write_curves(folder: Path, findings: Findings) -> None:
    """shift_<distortion>.csv, risk_coverage.csv, and convergence.csv where there are steps."""
    for distortion in distortions_in(findings.predictions):
        write_csv(folder / f"shift_{distortion}.csv", level_rows(findings.metrics, distortion))
    num_rows = len(next(iter(findings.risk.values())))
    columns = {"coverage": np.arange(1, num_rows + 1) / num_rows}
    columns |= {f"risk_{score}": risk.numpy() for score, risk in findings.risk.items()}
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    write_csv(folder / "risk_coverage.csv", [dict(zip(columns, r, strict=True)) for r in rows])
    if findings.steps:
        steps = [{"num_samples": count, **step} for count, step in enumerate(findings.steps, 1)]
        write_csv(folder / "convergence.csv", steps)


def draw_suite(folder: Path, findings: Findings) -> list[Path]:
    """risk_coverage.png, and shift.png, ood.png and convergence.png where they have a content."""
    likelihood, predictions = findings.likelihood, findings.predictions
    metrics, steps = findings.metrics, findings.steps
    is_regression = isinstance(likelihood, Regression)
    risk = "mean squared error of the kept" if is_regression else "error of the kept"
    figures = {"risk_coverage": plots.risk_coverage(findings.risk, risk)}
    shifted = {name: level_rows(metrics, name) for name in distortions_in(predictions)}
    if shifted:
        names = [key.removeprefix("test/") for key in metrics if key.startswith("test/")]
        lines = {
            name: {
                kind: [(row["level"], row[name]) for row in rows] for kind, rows in shifted.items()
            }
            for name in names
        }
        figures["shift"] = plots.panels(lines, "level of distortion")
    shown = {n: each for n, each in predictions.items() if n == "test" or n.startswith("ood/")}
    if len(shown) > 1:
        scores = {name: likelihood.scores(each.summary) for name, each in shown.items()}
        first = next(iter(scores["test"]))
        groups = {name: of_set[first] for name, of_set in scores.items()}
        figures["ood"] = plots.score_histograms(groups, first)
    if steps:
        lines = {
            name: {"test": [(count, step[name]) for count, step in enumerate(steps, 1)]}
            for name in steps[0]
        }
        figures["convergence"] = plots.panels(lines, "draws")
    return [plots.save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def level_rows(metrics: Mapping[str, float], distortion: str) -> list[dict[str, float]]:
    """Every metric of the test images as they are (level 0), and at each level of a distortion."""
    names = [key.removeprefix("test/") for key in metrics if key.startswith("test/")]
    rows = []
    kind = DISTORTIONS[distortion]
    for level, amount in enumerate((kind.nothing, *kind.amounts)):
        at = f"shift/{distortion}_{level}" if level > 0 else "test"
        rows.append({"level": level, "amount": amount, **{n: metrics[f"{at}/{n}"] for n in names}})
    return rows


def suite_table(metrics: Mapping[str, float]) -> str:
    """The main metrics as text for a terminal, a line per set; of distortions, their means."""
    sets = dict.fromkeys(key.rpartition("/")[0] for key in metrics)
    lines = [name for name in sets if not name.startswith("shift/") or name.endswith("_mean")]
    names = [n for n in (*TABLE, *DETECTION) if any(f"{line}/{n}" in metrics for line in lines)]
    cells = {line: [metrics.get(f"{line}/{name}") for name in names] for line in lines}
    return text_table(names, cells, first=max(map(len, lines)) + 2, others=15)
