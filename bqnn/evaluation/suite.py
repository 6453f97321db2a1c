"""What a network is evaluated on beyond its test set, and what its predictions say there.

Sets have names: train, val, test; ood/fashion_mnist and the like; shift/rotation_1 to
shift/rotation_5 and the like. Those names are the first part of every metric's key.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bqnn.data import TensorData
from bqnn.data.distortions import DISTORTIONS, distort
from bqnn.data.images import ImageData
from bqnn.data.ood import unfamiliar_sets
from bqnn.inference.detection import detection
from bqnn.inference.likelihoods import Likelihood, as_they_are
from bqnn.inference.metrics import risk_coverage
from bqnn.methods import Method

LEVELS = range(1, 6)


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Inputs as raw as those of a data set, and their targets where there are any."""

    inputs: Tensor
    targets: Tensor | None


@dataclass(frozen=True, eq=False)
class Prediction:
    """Of one set: the draws of the outputs [S, N, ...], and what `Likelihood.summary` says."""

    samples: Tensor
    targets: Tensor | None
    summary: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Findings:
    """All that one set of draws says.

    metrics: every metric of every set, under keys such as test/nll. risk: of the test set at
    coverage 1/N, 2/N, ..., 1, for each score that orders its rows. steps: the test metrics after
    1, 2, ... draws, or nothing.
    """

    likelihood: Likelihood
    predictions: dict[str, Prediction]
    metrics: dict[str, float]
    risk: dict[str, Tensor]
    steps: list[dict[str, float]]


def make_sets(data: TensorData, suite: Mapping[str, Any]) -> dict[str, EvaluationSet]:
    """The sets that a group `suite` of the configuration asks for, by name.

    Tables have no distortions, and where no rows validate there is no val. ValueError: a name in
    the suite is unknown, or test is missing.
    """
    unknown = set(suite["splits"]) - {"train", "val", "test"}
    if unknown or "test" not in suite["splits"]:
        raise ValueError(
            f"suite.splits={list(suite['splits'])}: choose of train, val and test, and keep test, "
            "which all else is compared with"
        )
    sets = {}
    for name in suite["splits"]:
        rows = {"train": data.train, "val": data.val, "test": data.test}[name]
        if rows is not None:
            sets[name] = EvaluationSet(rows.inputs, rows.targets)
    for name, (inputs, targets) in unfamiliar_sets(data, suite["ood"]).items():
        sets[f"ood/{name}"] = EvaluationSet(inputs, targets)
    for name in suite["distortions"]:
        if name not in DISTORTIONS:
            raise ValueError(f"suite.distortions: no {name!r}; choose of {', '.join(DISTORTIONS)}")
        if isinstance(data, ImageData):
            for level in LEVELS:
                images = distort(data.test.inputs, DISTORTIONS[name], level, data.white)
                sets[f"shift/{name}_{level}"] = EvaluationSet(images, data.test.targets)
    return sets


def predict_sets(
    model: Method,
    data: TensorData,
    sets: Mapping[str, EvaluationSet],
    num_samples: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Prediction]:
    """Predict all sets from one set of draws, of which `progress` is told (`predictive_sets`)."""
    inputs = [each.inputs.to(model.device) for each in sets.values()]
    draws = model.predictive_sets(inputs, data.normalize, num_samples, progress)
    predictions = {}
    for (name, each), on_device in zip(sets.items(), draws, strict=True):
        samples = on_device.cpu()
        summary = model.likelihood.summary(samples)
        predictions[name] = Prediction(samples, each.targets, summary)
    return predictions


def judge(
    likelihood: Likelihood, predictions: dict[str, Prediction], convergence: bool = False
) -> Findings:
    """Score predictions; of a distortion's five levels also the mean, as shift/rotation_mean.

    Metrics that are not finite are given as they are.
    """
    curves = {
        name: risk_curves(likelihood, each)
        for name, each in predictions.items()
        if each.targets is not None
    }
    sets = {
        name: _set_metrics(likelihood, each, curves.get(name, {}))
        for name, each in predictions.items()
    }
    familiar = likelihood.scores(predictions["test"].summary)
    for name, each in predictions.items():
        if name.startswith("ood/"):
            for score, values in likelihood.scores(each.summary).items():
                for metric, value in detection(familiar[score], values).items():
                    sets[name][f"{metric}_{score}"] = value
    for distortion in distortions_in(sets):
        levels = [sets[f"shift/{distortion}_{level}"] for level in LEVELS]
        sets[f"shift/{distortion}_mean"] = {
            metric: sum(at_level[metric] for at_level in levels) / len(levels)
            for metric in levels[0]
        }
    metrics = {f"{name}/{key}": value for name, of in sets.items() for key, value in of.items()}
    test = predictions["test"]
    assert test.targets is not None
    steps = likelihood.convergence(test.samples, test.targets) if convergence else []
    return Findings(likelihood, predictions, metrics, curves["test"], steps)


def distortions_in(names: Mapping[str, Any]) -> list[str]:
    """The distortions whose levels are among the names of sets."""
    return [name for name in DISTORTIONS if f"shift/{name}_1" in names]


def risk_curves(likelihood: Likelihood, each: Prediction) -> dict[str, Tensor]:
    """Risk of a set with targets at coverage 1/N, 2/N, ..., 1, for each score that orders rows."""
    assert each.targets is not None
    losses = likelihood.losses(each.summary, each.targets)
    scores = likelihood.scores(each.summary)
    return {name: risk_coverage(values, losses) for name, values in scores.items()}


def _set_metrics(
    likelihood: Likelihood, each: Prediction, curves: Mapping[str, Tensor]
) -> dict[str, float]:
    uncertainty = as_they_are(likelihood.uncertainty, each.summary)
    if each.targets is None:
        return uncertainty
    areas = {f"aurc_{score}": risk.mean().item() for score, risk in curves.items()}
    metrics = as_they_are(likelihood.metrics, each.samples, each.targets)
    return metrics | uncertainty | areas
