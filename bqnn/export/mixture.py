"""The mixture of draws in a file: the outputs that `Likelihood.summary` computes."""

import math
from collections.abc import Sequence

import numpy as np

from bqnn.inference.calibration import (
    Calibration,
    DeviationScaling,
    TemperatureScaling,
    VectorScaling,
)
from bqnn.inference.likelihoods import Classification, Likelihood, Regression
from bqnn.quant.onnx.graph import Graph, Port


def write_mixture(
    graph: Graph,
    draws: Sequence[str],
    likelihood: Likelihood,
    calibration: Calibration | None = None,
) -> tuple[str, dict[str, Port]]:
    """Write the summary of draws, in float64.

    Args:
        graph: The graph to write into.
        draws: The outputs of each draw [N, num_outputs].
        likelihood: The likelihood.
        calibration: Calibrates the draws before they are mixed; None leaves them as they are.

    Returns:
        The name of all draws [S, N, num_outputs] before the calibration, and the outputs of the
        file: class probabilities, their entropy and its parts in float32, or a mean and its
        standard deviations in original units in float64.

    Raises:
        TypeError: The likelihood or the calibration is not one of bqnn.
    """
    first = graph.constant(np.array([0], np.int64))
    samples = graph.call("Concat", *[graph.call("Unsqueeze", d, first) for d in draws], axis=0)
    values = graph.cast(samples, np.float64)
    if calibration is not None:
        values = _calibrated(graph, values, calibration)
    if isinstance(likelihood, Classification):
        return samples, _classification(graph, values, len(likelihood.class_names))
    if isinstance(likelihood, Regression):
        return samples, _regression(graph, values, likelihood)
    raise TypeError(f"export: the likelihood {type(likelihood).__name__} cannot be exported")


def _calibrated(graph: Graph, draws: str, calibration: Calibration) -> str:
    """Write what a calibration computes from draws [S, N, num_outputs]."""
    match calibration:
        case TemperatureScaling(temperature):
            return graph.call("Div", draws, graph.constant(np.float64(temperature)))
        case VectorScaling(scale, bias):
            scaled = graph.call("Mul", draws, graph.constant(np.array(scale)))
            return graph.call("Add", scaled, graph.constant(np.array(bias)))
        case DeviationScaling(factor):
            # The mean is (m, 0): means move away from m, and log variances are shifted.
            mean = graph.call("ReduceMean", draws, axes=(0,), keepdims=1)
            mean = graph.call("Mul", mean, graph.constant(np.array([1.0, 0.0])))
            deviation = graph.call("Sub", draws, mean)
            scaled = graph.call("Mul", deviation, graph.constant(np.array([factor, 1.0])))
            shift = graph.constant(np.array([0.0, 2 * math.log(factor)]))
            return graph.call("Add", graph.call("Add", scaled, mean), shift)
    raise TypeError(f"export: the calibration {type(calibration).__name__} cannot be exported")


def _classification(graph: Graph, logits: str, num_classes: int) -> dict[str, Port]:
    each = graph.call("Softmax", logits, axis=-1)
    probabilities = graph.call("ReduceMean", each, axes=(0,), keepdims=0)
    entropy = _entropy(graph, probabilities)
    aleatoric = graph.call("ReduceMean", _entropy(graph, each), axes=(0,), keepdims=0)
    difference = graph.call("Sub", entropy, aleatoric)
    mutual = graph.call("Max", difference, graph.constant(np.float64(0)))
    outputs = {
        "probabilities": (probabilities, ("N", num_classes)),
        "entropy": (entropy, ("N",)),
        "aleatoric": (aleatoric, ("N",)),
        "mutual_information": (mutual, ("N",)),
    }
    float32 = np.dtype(np.float32)
    return {
        graph.cast(value, float32): Port(name, float32, shape)
        for name, (value, shape) in outputs.items()
    }


def _entropy(graph: Graph, probabilities: str) -> str:
    """Compute the entropy over the last axis, with 0 log 0 = 0."""
    least = graph.constant(np.float64(np.finfo(np.float64).tiny))
    logs = graph.call("Log", graph.call("Max", probabilities, least))
    terms = graph.call("Mul", probabilities, logs)
    sums = graph.call("ReduceSum", terms, graph.constant(np.array([-1], np.int64)), keepdims=0)
    return graph.call("Neg", sums)


def _regression(graph: Graph, samples: str, likelihood: Regression) -> dict[str, Port]:
    means, log_variances = (
        graph.call("Gather", samples, graph.constant(np.int64(place)), axis=-1) for place in (0, 1)
    )

    def averaged(values: str) -> str:
        return graph.call("ReduceMean", values, axes=(0,), keepdims=0)

    std = graph.constant(np.float64(likelihood.target_std))
    mean = averaged(means)
    aleatoric = averaged(graph.call("Exp", log_variances))
    deviation = graph.call("Sub", means, mean)
    epistemic = averaged(graph.call("Mul", deviation, deviation))
    variances = {
        "std": graph.call("Add", aleatoric, epistemic),
        "aleatoric_std": aleatoric,
        "epistemic_std": epistemic,
    }
    shifted = graph.call(
        "Add", graph.call("Mul", mean, std), graph.constant(np.float64(likelihood.target_mean))
    )
    values = {"mean": shifted} | {
        name: graph.call("Mul", graph.call("Sqrt", variance), std)
        for name, variance in variances.items()
    }
    return {value: Port(name, np.dtype(np.float64), ("N",)) for name, value in values.items()}
