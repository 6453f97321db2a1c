"""Predictions of a set of rows, and the one way to score them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from bqnn.inference.likelihoods import Likelihood
from bqnn.inference.metrics import Mixture, MixtureMetrics, NotFiniteError


@dataclass(frozen=True, eq=False)
class Prediction:
    """Draws of a network's output for a set of rows, as the network gives and reads them.

    Attributes:
        likelihood: What the draws mean.
        samples: Logits, or means and log variances in standardized units [S, N, num_outputs].
        targets: Class indices or standardized targets [N], where they are known.

    Example:
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

    @cached_property
    def mixture(self) -> Mixture:
        """The predictive distribution of each row."""
        return self.likelihood.mixture(self.samples, self.targets)

    @cached_property
    def summary(self) -> dict[str, Tensor]:
        """What `Likelihood.summary` says of each row."""
        return self.likelihood.summary(self.mixture)


def score(*batches: Prediction, metrics: MixtureMetrics | None = None) -> dict[str, float]:
    """Compute every metric of predictions whose targets are known, over all of their rows.

    Each process scores the rows that it has itself.

    Args:
        batches: Predictions of one likelihood.
        metrics: Its metrics, to be used again; making them anew takes a millisecond.

    Raises:
        NotFiniteError: A metric is infinite or NaN; it has all of them.
        ValueError: A draw is not finite, or there are no targets.
    """
    if metrics is None:
        metrics = batches[0].likelihood.metrics(sync_on_compute=False)
    metrics.reset()
    for batch in batches:
        metrics.update(batch.mixture)
    return metrics.finite_numbers()


def score_uncertainty(prediction: Prediction) -> dict[str, float]:
    """Compute how uncertain predictions are on average; no targets are needed.

    Raises:
        NotFiniteError: A metric is infinite or NaN; it has all of them.
        ValueError: A draw is not finite.
    """
    metrics = prediction.likelihood.uncertainty(sync_on_compute=False)
    metrics.update(prediction.mixture)
    return metrics.finite_numbers()


def as_they_are(
    measure: Callable[[Prediction], dict[str, float]], prediction: Prediction
) -> dict[str, float]:
    """Return what `measure(prediction)` returns, or all metrics where some are not finite."""
    try:
        return measure(prediction)
    except NotFiniteError as error:
        return error.metrics
