"""Coverage and size of conformal prediction sets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bqnn.inference.conformal import CLASS_SCORES, INTERVAL_SCORES, ClassSets, Intervals
from bqnn.inference.likelihoods import Classification, Regression
from bqnn.inference.predictions import Prediction

SetPredictor = ClassSets | Intervals


def fit_conformal(validation: Prediction, alpha: float) -> dict[str, SetPredictor]:
    """Fit the threshold of every score on validation rows.

    Args:
        validation: The prediction of rows that the network was not trained on.
        alpha: The share of targets that sets may miss.

    Returns:
        Sets by lac, aps and raps for classes, or by normalized and cqr for a regression.

    Raises:
        ValueError: There are too few rows.
    """
    targets, likelihood = validation.targets, validation.likelihood
    assert targets is not None
    if isinstance(likelihood, Regression):
        return {
            name: Intervals.fit(name, likelihood, validation.samples, targets, alpha)
            for name in INTERVAL_SCORES
        }
    probabilities = validation.summary["probabilities"]
    return {name: ClassSets.fit(name, probabilities, targets, alpha) for name in CLASS_SCORES}


def conformal_metrics(
    sets: Mapping[str, SetPredictor], prediction: Prediction, has_coverage: bool
) -> dict[str, float]:
    """Compute the mean size of the sets of some rows, and how many of their targets they cover.

    Args:
        sets: The result of `fit_conformal`.
        prediction: The prediction of the rows.
        has_coverage: Whether the rows have targets that the sets can be expected to cover.

    Returns:
        `size_<score>` (the number of classes) or `width_<score>` (in the unit of the target),
        and `coverage_<score>`. For classes, `worst_class_coverage_<score>` is the least coverage
        of all classes.
    """
    metrics: dict[str, float] = {}
    for score, of_score in sets.items():
        sizes, covered = _sets(of_score, prediction)
        size = "size" if isinstance(of_score, ClassSets) else "width"
        metrics[f"{size}_{score}"] = sizes.mean().item()
        if has_coverage:
            assert covered is not None
            metrics[f"coverage_{score}"] = covered.mean().item()
        if has_coverage and isinstance(of_score, ClassSets):
            assert covered is not None
            by_class = [covered[rows].mean() for rows in _rows_by_class(prediction).values()]
            metrics[f"worst_class_coverage_{score}"] = torch.stack(by_class).min().item()
    return metrics


def conformal_rows(
    sets: Mapping[str, SetPredictor], name: str, prediction: Prediction
) -> list[dict[str, Any]]:
    """List coverage and mean size of a set of rows with targets, for all rows and per class.

    Args:
        sets: The result of `fit_conformal`.
        name: The name of the set of rows.
        prediction: The prediction of the rows.

    Returns:
        A row per score and class: set, score, class, rows, coverage and size.
    """
    table = []
    for score, of_score in sets.items():
        sizes, covered = _sets(of_score, prediction)
        assert covered is not None
        groups = {"all": torch.ones(len(sizes), dtype=torch.bool)}
        if isinstance(of_score, ClassSets):
            groups |= _rows_by_class(prediction)
        for group, rows in groups.items():
            numbers = {"coverage": covered[rows].mean().item(), "size": sizes[rows].mean().item()}
            count = int(rows.sum())
            table.append({"set": name, "score": score, "class": group, "rows": count, **numbers})
    return table


def _sets(of_score: SetPredictor, prediction: Prediction) -> tuple[Tensor, Tensor | None]:
    """Return the size of each set, and whether it covers its target, in float64 [N]."""
    targets, likelihood = prediction.targets, prediction.likelihood
    if isinstance(of_score, ClassSets):
        members = of_score(prediction.summary["probabilities"]).double()
        covered = None if targets is None else members.gather(1, targets[:, None])[:, 0]
        return members.sum(1), covered
    assert isinstance(likelihood, Regression)
    lower, upper = of_score(likelihood, prediction.samples).unbind(-1)
    sizes = (upper - lower).clamp_min(0)
    if targets is None:
        return sizes, None
    original = likelihood.target_mean + likelihood.target_std * targets.double()
    return sizes, ((lower <= original) & (original <= upper)).double()


def _rows_by_class(prediction: Prediction) -> dict[str, Tensor]:
    """Return the mask of the rows of each class that has any."""
    likelihood, targets = prediction.likelihood, prediction.targets
    assert isinstance(likelihood, Classification)
    assert targets is not None
    masks = {name: targets == index for index, name in enumerate(likelihood.class_names)}
    return {name: rows for name, rows in masks.items() if rows.any()}
