"""Predictions of a set of rows, and their scores."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from bqnn.inference.calibration import Calibration
from bqnn.inference.likelihoods import Likelihood
from bqnn.inference.metrics import Mixture, MixtureMetrics, NotFiniteError


@dataclass(frozen=True, eq=False)
class Prediction:
    """Draws of a network's output for a set of rows, in the units of the network.

    Attributes:
        likelihood: The likelihood of the outputs.
        samples: Logits, or means and log variances in standardized units [S, N, num_outputs]; NaN
            for draws that a row did not make.
        targets: Class indices or standardized targets [N], or None.
        num_samples: The number of draws of each row [N]; None for S.

    Examples:
        >>> import torch
        >>> from bqnn.inference.likelihoods import Classification
        >>> likelihood = Classification(["cat", "dog"])
        >>> prediction = Prediction(likelihood, torch.zeros(3, 4, 2), torch.tensor([0, 1, 1, 0]))
        >>> score(prediction)["brier"]
        0.5
    """

    likelihood: Likelihood
    samples: Tensor
    targets: Tensor | None = None
    num_samples: Tensor | None = None

    @cached_property
    def mixture(self) -> Mixture:
        """The predictive distribution of each row."""
        return self.likelihood.mixture(self.samples, self.targets, self.num_samples)

    @cached_property
    def summary(self) -> dict[str, Tensor]:
        """The result of `Likelihood.summary` for each row."""
        return self.likelihood.summary(self.mixture)

    def calibrated(self, calibration: Calibration | None) -> "Prediction":
        """Return the prediction with calibrated draws; None leaves them as they are."""
        if calibration is None:
            return self
        return Prediction(self.likelihood, calibration(self.samples), self.targets)


def score(*batches: Prediction, metrics: MixtureMetrics | None = None) -> dict[str, float]:
    """Compute every metric of predictions with targets, over all rows.

    Processes are not synchronized: each scores its own rows.

    Args:
        batches: Predictions of one likelihood.
        metrics: The metrics of the likelihood, for reuse; creating them takes a millisecond.

    Returns:
        The metrics by name.

    Raises:
        NotFiniteError: A metric is infinite or NaN. The error contains all metrics.
        ValueError: A draw is not finite, or there are no targets.
    """
    if metrics is None:
        metrics = batches[0].likelihood.metrics(sync_on_compute=False)
    metrics.reset()
    for batch in batches:
        metrics.update(batch.mixture)
    return metrics.finite_numbers()


def score_uncertainty(prediction: Prediction) -> dict[str, float]:
    """Compute the average uncertainty of predictions, which needs no targets.

    Args:
        prediction: The predictions of a set of rows.

    Returns:
        The metrics of `Likelihood.uncertainty` by name.

    Raises:
        NotFiniteError: A metric is infinite or NaN. The error contains all metrics.
        ValueError: A draw is not finite.

    Examples:
        >>> import torch
        >>> from bqnn.inference.likelihoods import Classification
        >>> prediction = Prediction(Classification(["cat", "dog"]), torch.zeros(3, 4, 2))
        >>> round(score_uncertainty(prediction)["ape"], 4)
        0.6931
    """
    metrics = prediction.likelihood.uncertainty(sync_on_compute=False)
    metrics.update(prediction.mixture)
    return metrics.finite_numbers()


def with_non_finite(
    measure: Callable[[Prediction], dict[str, float]], prediction: Prediction
) -> dict[str, float]:
    """Return `measure(prediction)`, also if some metrics are not finite."""
    try:
        return measure(prediction)
    except NotFiniteError as error:
        return error.metrics
