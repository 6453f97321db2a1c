"""Predictions of a job, with progress on the terminal or in the log."""

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
) -> dict[str, Prediction]:
    """Predict sets of rows, and show which set and which draw that is at.

    Args:
        job: Its `trainer.progress_bar` says whether progress is shown.
        numeric: What the model is: float, unquantized, simulated or int8.
        model: The network, in evaluation mode.
        sets: The sets by name.
        normalize: Makes what the network reads of raw inputs.
        num_samples: The number of draws.

    Returns:
        The predictions by name.
    """
    is_shown = job.config["trainer"]["progress_bar"]
    with evaluation_progress(numeric, list(sets), num_samples, is_shown) as progress:
        return predict_sets(model, sets, normalize, num_samples, progress)
