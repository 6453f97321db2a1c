"""Evaluation suites: the sets on which a network is evaluated, and the metrics of its predictions.

Sets are named train, val and test, ood/<data set> such as ood/fashion_mnist, and
shift/<distortion>_<level> such as shift/rotation_1. The name of the set starts the key of a metric.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bqnn.data import TensorData
from bqnn.data.distortions import DISTORTIONS, distort
from bqnn.data.images import ImageData
from bqnn.data.ood import ood_sets
from bqnn.evaluation.conformal import SetPredictor, conformal_metrics, conformal_rows
from bqnn.inference.likelihoods import Classification
from bqnn.inference.moments import NUM_SAMPLES, SinglePass
from bqnn.inference.predictions import Prediction, score, score_uncertainty, with_non_finite
from bqnn.inference.ranking import AUGRC, AURC, FPR95, RiskCoverage, detection_metrics
from bqnn.methods import Method
from bqnn.methods.base import channels_last

LEVELS = range(1, 6)
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """A set of rows.

    Attributes:
        inputs: Raw inputs [N, ...], before `TensorData.normalize`.
        targets: Targets [N], or None if there are none.
    """

    inputs: Tensor
    targets: Tensor | None


@dataclass(frozen=True, eq=False)
class Findings:
    """The results of a suite.

    Attributes:
        predictions: The prediction of each set.
        metrics: Every metric of every set, with keys such as test/nll.
        risk: The risk [N] of the test set at coverage 1/N, 2/N, ..., 1, for each score that ranks
            its rows.
        steps: The test metrics after 1, 2, ... draws; empty if they were not requested.
        conformal: A row for each set, score and class of `conformal_rows`; empty if not requested.
    """

    predictions: dict[str, Prediction]
    metrics: dict[str, float]
    risk: dict[str, Tensor]
    steps: list[dict[str, float]]
    conformal: list[dict[str, Any]] = field(default_factory=list)


def split_sets(data: TensorData, names: Iterable[str]) -> dict[str, EvaluationSet]:
    """Return the named splits of a data set, without val if it has no validation rows."""
    rows = {"train": data.train, "val": data.val, "test": data.test}
    return {
        name: EvaluationSet(split.inputs, split.targets)
        for name in names
        if (split := rows[name]) is not None
    }


def validation_set(data: TensorData, wanted: str) -> EvaluationSet:
    """Return the validation rows, on which something is fitted after the training.

    Args:
        data: The data set, after `setup`.
        wanted: What is fitted, for the error.

    Raises:
        ValueError: There are no validation rows.
    """
    if data.val is None:
        raise ValueError(
            f"{wanted}: it is fitted on validation rows, and the training kept none; train again "
            "with task.validation_share above 0, such as 0.1, and task.refit=false"
        )
    return EvaluationSet(data.val.inputs, data.val.targets)


def make_sets(data: TensorData, suite: Mapping[str, Any]) -> dict[str, EvaluationSet]:
    """Make the sets of a suite. Distortions are ignored for tables.

    Args:
        data: The data set, after `setup`.
        suite: The group `suite` of the configuration: `splits`, `ood` and `distortions`.

    Returns:
        The sets by name.

    Raises:
        ValueError: A name in the suite is unknown, or test is missing.
    """
    unknown = set(suite["splits"]) - set(SPLITS)
    if unknown or "test" not in suite["splits"]:
        raise ValueError(
            f"suite.splits={list(suite['splits'])}: choose among train, val and test, and include "
            "test, with which all other sets are compared"
        )
    sets = split_sets(data, suite["splits"])
    for name, (inputs, targets) in ood_sets(data, suite["ood"]).items():
        sets[f"ood/{name}"] = EvaluationSet(inputs, targets)
    for name in suite["distortions"]:
        if name not in DISTORTIONS:
            raise ValueError(
                f"suite.distortions: no {name!r}; choose among {', '.join(DISTORTIONS)}"
            )
        if isinstance(data, ImageData):
            for level in LEVELS:
                images = distort(data.test.inputs, DISTORTIONS[name], level, data.white)
                sets[f"shift/{name}_{level}"] = EvaluationSet(images, data.test.targets)
    return sets


def predict_sets(
    model: Method,
    sets: Mapping[str, EvaluationSet],
    normalize: Callable[[Tensor], Tensor],
    num_samples: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    tolerance: float | None = None,
) -> dict[str, Prediction]:
    """Predict several sets with the same draws.

    Args:
        model: The model, in evaluation mode. It predicts on its own device.
        sets: The sets by name.
        normalize: Converts raw inputs to inputs of the network, as `TensorData.normalize` does.
        num_samples: The number of draws S; None for the default of the method.
        progress: Called with the index of a set and of a draw after each prediction.
        tolerance: Lets rows stop early, see `Method.predictive_until_settled`; None makes all
            draws.

    Returns:
        The predictions by name, on the CPU.
    """
    inputs = [each.inputs.to(model.device) for each in sets.values()]
    if tolerance is None:
        draws = model.predictive_sets(inputs, normalize, num_samples, progress)
        return {
            name: Prediction(model.likelihood, samples.cpu(), each.targets)
            for (name, each), samples in zip(sets.items(), draws, strict=True)
        }
    max_samples = model.check_samples(num_samples)
    early = model.predictive_until_settled(inputs, normalize, max_samples, tolerance, progress)
    return {
        name: Prediction(model.likelihood, draws.samples.cpu(), each.targets, draws.num_samples)
        for (name, each), draws in zip(sets.items(), early, strict=True)
    }


def predict_sets_once(
    model: Method,
    sets: Mapping[str, EvaluationSet],
    normalize: Callable[[Tensor], Tensor],
    fitted_on: Tensor,
    num_samples: int | None = None,
) -> tuple[dict[str, Prediction], float]:
    """Predict several sets by the moments of the outputs, see `bqnn.inference.moments`.

    Args:
        model: The model, in evaluation mode.
        sets: The sets by name.
        normalize: Converts raw inputs to inputs of the network, as `TensorData.normalize` does.
        fitted_on: Raw rows on which the factor of the variances is fitted.
        num_samples: The number of draws from the moments; None for 100.

    Returns:
        The predictions by name, on the CPU, and the factor.

    Raises:
        TypeError: A layer has no moments.
        ValueError: The network has nothing random, or its draws are members of an ensemble.
    """
    single_pass = SinglePass(
        model.net, model.likelihood, lambda rows: channels_last(normalize(rows))
    )
    single_pass.fit(fitted_on.to(model.device), seed=model.seed)
    assert single_pass.factor is not None
    predictions = {}
    for name, each in sets.items():
        inputs = each.inputs.to(model.device)
        draws = single_pass.predict(inputs, num_samples or NUM_SAMPLES, seed=model.seed)
        draws = draws if model.calibration is None else model.calibration(draws)
        predictions[name] = Prediction(model.likelihood, draws.cpu(), each.targets)
    return predictions, single_pass.factor


def score_sets(predictions: Mapping[str, Prediction]) -> dict[str, float]:
    """Compute all metrics of predictions with targets, with keys such as test/nll.

    Metrics that are not finite are returned unchanged, and `require_results` reports them.
    """
    return {
        f"{name}/{metric}": value
        for name, prediction in predictions.items()
        for metric, value in with_non_finite(score, prediction).items()
    }


def judge(
    predictions: dict[str, Prediction],
    convergence: bool = False,
    conformal: Mapping[str, SetPredictor] | None = None,
) -> Findings:
    """Compute the metrics of a suite.

    The mean over the five levels of a distortion has keys such as shift/rotation_mean/nll. Metrics
    that are not finite are returned unchanged.

    Args:
        predictions: The prediction of each set, including test.
        convergence: Whether to compute the test metrics after 1, 2, ... draws.
        conformal: Sets from `fit_conformal`, whose size is measured on all sets but train and val,
            and whose coverage on test and shifted sets.
    """
    test = predictions["test"]
    assert test.targets is not None
    sets = {name: _set_metrics(each) for name, each in predictions.items()}
    for name, each in predictions.items():
        if name.startswith("ood/"):
            sets[name] |= _detection(test, each)
        elif isinstance(each.likelihood, Classification):
            sets[name] |= _detection_of_errors(each)
    covered = [name for name in predictions if name == "test" or name.startswith("shift/")]
    for name, each in predictions.items():
        if conformal and name not in ("train", "val"):
            sets[name] |= conformal_metrics(conformal, each, has_coverage=name in covered)
    for distortion in distortions_in(sets):
        levels = [sets[f"shift/{distortion}_{level}"] for level in LEVELS]
        sets[f"shift/{distortion}_mean"] = {
            metric: sum(at_level[metric] for at_level in levels) / len(levels)
            for metric in levels[0]
        }
    metrics = {f"{name}/{key}": value for name, of in sets.items() for key, value in of.items()}
    risk = {name: area.curve() for name, area in _areas(AURC, test).items()}
    steps = test.likelihood.convergence(test.samples, test.targets) if convergence else []
    table = [
        row for name in covered for row in conformal_rows(conformal or {}, name, predictions[name])
    ]
    return Findings(predictions, metrics, risk, steps, table)


def distortions_in(names: Mapping[str, Any]) -> list[str]:
    """Return the distortions whose levels are among the names of sets."""
    return [name for name in DISTORTIONS if f"shift/{name}_1" in names]


def _areas(kind: type[RiskCoverage], each: Prediction) -> dict[str, RiskCoverage]:
    """Compute the risk of a set with targets, for each score that ranks its rows."""
    assert each.targets is not None
    losses = each.likelihood.losses(each.summary, each.targets)
    areas = {}
    for name, scores in each.likelihood.scores(each.summary).items():
        areas[name] = kind(sync_on_compute=False)
        areas[name].update(scores, losses)
    return areas


def _detection(familiar: Prediction, unfamiliar: Prediction) -> dict[str, float]:
    """Measure how well each score separates a set from the test set."""
    found = {}
    known = familiar.likelihood.scores(familiar.summary)
    for name, scores in unfamiliar.likelihood.scores(unfamiliar.summary).items():
        both = torch.cat([known[name], scores])
        metrics = detection_metrics(sync_on_compute=False)
        metrics.update(both, torch.arange(len(both)) >= len(known[name]))
        for metric, value in metrics.compute().items():
            found[f"{metric.lower()}_{name}"] = value.item()
    return found


def _detection_of_errors(each: Prediction) -> dict[str, float]:
    """Measure how well each score separates wrong predictions from correct ones."""
    assert each.targets is not None
    is_wrong = each.likelihood.losses(each.summary, each.targets) > 0
    found = {}
    for name, scores in each.likelihood.scores(each.summary).items():
        metric = FPR95(sync_on_compute=False)
        metric.update(scores, is_wrong)
        found[f"fpr95_error_{name}"] = metric.compute().item()
    return found


def _set_metrics(each: Prediction) -> dict[str, float]:
    uncertainty = with_non_finite(score_uncertainty, each)
    if each.num_samples is not None:
        uncertainty["num_samples"] = each.num_samples.double().mean().item()
    if each.targets is None:
        return uncertainty
    risks = {
        f"{area}_{name}": metric.compute().item()
        for area, kind in (("aurc", AURC), ("augrc", AUGRC))
        for name, metric in _areas(kind, each).items()
    }
    return with_non_finite(score, each) | uncertainty | risks
