"""Predict the sets of a job, with progress on the terminal or in the log."""

from collections.abc import Callable, Mapping

from torch import Tensor

from bqnn.evaluation.suite import EvaluationSet, predict_sets
from bqnn.inference.predictions import Prediction
from bqnn.jobs.job import Job
from bqnn.methods import Method
from bqnn.training.progress import evaluation_progress


def predict(
    job: Job,
    numeric: str,
    model: Method,
    sets: Mapping[str, EvaluationSet],
    normalize: Callable[[Tensor], Tensor],
    num_samples: int,
    tolerance: float | None = None,
) -> dict[str, Prediction]:
    """Predict sets of rows, and show the progress over sets and draws.

    Args:
        job: The job. Its `trainer.progress_bar` turns the progress on.
        numeric: The numeric of the model: float, unquantized, simulated or int8.
        model: The model, in evaluation mode.
        sets: The sets by name.
        normalize: Converts raw inputs to inputs of the network.
        num_samples: The number of draws.
        tolerance: Lets rows stop early, after at most that number of draws; None for all draws.

    Returns:
        The predictions by name.
    """
    is_shown = job.config["trainer"]["progress_bar"]
    with evaluation_progress(numeric, list(sets), num_samples, is_shown) as progress:
        return predict_sets(model, sets, normalize, num_samples, progress, tolerance)
