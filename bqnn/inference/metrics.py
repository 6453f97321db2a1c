"""torchmetrics classes that score the draws of a network's output.

Each metric is updated with draws [S, B, num_outputs] and, where it compares them with the truth,
targets [B]. States are float64 sums over rows: batches may have any size, and distributed
processes are summed. `Likelihood.metrics` collects those of a likelihood.

torchmetrics has classes for some of these numbers. They take one prediction per row instead of
draws, and most of them compute in float32.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_cat

from bqnn.inference.functional import (
    CalibrationBins,
    adaptive_calibration_error,
    brier_score,
    calibration_sums,
    entropy,
    gaussian_nll,
    inside_interval,
    interval_score,
    mutual_information,
)
from bqnn.inference.mixtures import CategoricalMixture, GaussianMixture

Mixture = CategoricalMixture | GaussianMixture


class NotFiniteError(ValueError):
    """A metric of finite draws is infinite or NaN.

    Attributes:
        metrics: All metrics as they are, so that the others are not lost.
    """

    def __init__(self, message: str, metrics: dict[str, float]) -> None:
        super().__init__(message)
        self.metrics = metrics


class MixtureMetrics(MetricCollection):
    """A MetricCollection whose metrics share one mixture of the draws, and keep their order.

    Args:
        mix: Makes the mixture of draws and targets.
        metrics: The metrics by name.

    Examples:
        >>> collection = MixtureMetrics(CategoricalMixture.of, {"nll": CategoricalNLL()})
        >>> collection.update(torch.zeros(3, 5, 2), torch.tensor([0, 1, 1, 0, 1]))
        >>> collection.compute()
        {'nll': tensor(0.6931, dtype=torch.float64)}
    """

    def __init__(self, mix: Callable[..., Mixture], metrics: Mapping[str, Metric]) -> None:
        # Compute groups would share the states of metrics that are equal after the first batch.
        super().__init__([], compute_groups=False)
        self.mix = mix
        for name, metric in metrics.items():  # the constructor would sort them
            self[name] = metric

    def update(self, draws: Tensor | Mixture, targets: Tensor | None = None) -> None:  # type: ignore[override]
        """Update every metric with draws [S, B, num_outputs], or with their mixture."""
        super().update(self.mix(draws, targets))

    def forward(self, draws: Tensor | Mixture, targets: Tensor | None = None) -> dict[str, Any]:
        """Update every metric, and compute the metrics of this batch only."""
        computed: dict[str, Any] = super().forward(self.mix(draws, targets))
        return computed

    def numbers(self) -> dict[str, float]:
        """Compute every metric as a Python number, finite or not."""
        return {str(name): metric.compute().item() for name, metric in self.items()}

    def finite_numbers(self) -> dict[str, float]:
        """Compute every metric as a Python number.

        Raises:
            NotFiniteError: The value of a row is infinite or NaN. The message names the first
                metric that has such rows.
        """
        numbers = self.numbers()
        for name, metric in self.items():
            if isinstance(metric, RowMean) and (bad := int(metric.num_non_finite)):
                raise NotFiniteError(
                    f"{name}: {bad} of {int(metric.num_rows)} rows are not finite, although the "
                    "samples are; look for a row far from the training rows, or a log variance so "
                    "large or small that exp() leaves the range of float64",
                    numbers,
                )
        return numbers


class RowMean(Metric, ABC):
    """Base class of metrics that average a value over rows.

    Subclasses name the mixture that they score, and compute the value of each row from it.

    Args:
        variant: Distinguishes metrics of one class whose rows have different values.
        options: Options of `torchmetrics.Metric`, such as `sync_on_compute`.
    """

    full_state_update = False
    is_differentiable = False
    mixture: ClassVar[type[CategoricalMixture] | type[GaussianMixture]]
    num_rows: Tensor
    num_non_finite: Tensor

    def __init__(self, variant: str = "", **options: Any) -> None:
        super().__init__(**options)
        # A MetricCollection merges metrics whose states have equal names and, after the first
        # batch, equal values. So metrics with different rows need states of different names.
        self._sum = f"sum_of_{type(self).__name__}{variant}"
        self.add_state(self._sum, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for count in ("num_rows", "num_non_finite"):
            self.add_state(count, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def rows(self, mixture: Any) -> Tensor:
        """Compute the value of each row [B]."""

    def update(self, draws: Tensor | Mixture, targets: Tensor | None = None) -> None:
        """Add rows.

        Args:
            draws: Draws of the output [S, B, num_outputs], or their mixture with its targets.
            targets: Targets [B]; None for metrics of uncertainty.

        Raises:
            ValueError: A draw is not finite, the shapes do not fit, or targets are missing.
        """
        values = self.rows(self.mixture.of(draws, targets))  # type: ignore[arg-type]
        setattr(self, self._sum, getattr(self, self._sum) + values.double().sum())
        self.num_rows += len(values)
        self.num_non_finite += (~values.isfinite()).sum()

    def compute(self) -> Tensor:
        """Return the mean over all rows, a float64 scalar."""
        mean: Tensor = getattr(self, self._sum) / self.num_rows
        return mean


class ErrorRate(RowMean):
    """Share of rows whose most probable class is not the target, from 0 to 1.

    Examples:
        >>> metric = ErrorRate()
        >>> metric.update(torch.tensor([[[2.0, 1.0], [2.0, 1.0]]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False
    mixture = CategoricalMixture

    def rows(self, mixture: CategoricalMixture) -> Tensor:
        return mixture.probabilities.max(-1).indices != _known(mixture.targets)


class CategoricalNLL(RowMean):
    """Mean negative log probability of the targets, in nats.

    Examples:
        >>> metric = CategoricalNLL()
        >>> metric.update(torch.zeros(3, 5, 2), torch.tensor([0, 1, 1, 0, 1]))
        >>> metric.compute()  # log 2
        tensor(0.6931, dtype=torch.float64)
    """

    higher_is_better = False
    mixture = CategoricalMixture

    def rows(self, mixture: CategoricalMixture) -> Tensor:
        return -_known(mixture.log_likelihood)


class BrierScore(RowMean):
    """Mean of sum_c (p_c - [y = c])^2, from 0 to 2.

    Examples:
        >>> metric = BrierScore()
        >>> metric.update(torch.zeros(3, 1, 2), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False
    mixture = CategoricalMixture

    def rows(self, mixture: CategoricalMixture) -> Tensor:
        return brier_score(mixture.probabilities, _known(mixture.targets))


class PredictiveEntropy(RowMean):
    """Average predictive entropy (aPE): the mean entropy of the mixture, in nats.

    Examples:
        >>> metric = PredictiveEntropy()
        >>> metric.update(torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]]))  # two draws disagree
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    mixture = CategoricalMixture

    def rows(self, mixture: CategoricalMixture) -> Tensor:
        return entropy(mixture.probabilities)


class ExpectedEntropy(RowMean):
    """Mean entropy of single draws, in nats: the aleatoric part of the predictive entropy.

    Examples:
        >>> metric = ExpectedEntropy()
        >>> metric.update(torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]]))  # both are certain
        >>> round(metric.compute().item(), 6)
        0.0
    """

    mixture = CategoricalMixture

    def rows(self, mixture: CategoricalMixture) -> Tensor:
        return mixture.expected_entropy


class MutualInformation(RowMean):
    """Mean mutual information of label and weights, in nats: the epistemic part of the entropy.

    Examples:
        >>> metric = MutualInformation()
        >>> metric.update(torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]]))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    mixture = CategoricalMixture

    def rows(self, mixture: CategoricalMixture) -> Tensor:
        return mutual_information(mixture.probabilities, mixture.expected_entropy)


class CalibrationError(Metric):
    """Expected calibration error over equal-width bins ((b-1)/B, b/B], from 0 to 1.

    torchmetrics' class puts a confidence of exactly 1.0 in an additional bin. Here it belongs to
    the last bin.

    Args:
        num_bins: The number of bins B. Compare only errors with equal numbers of bins.
        options: Options of `torchmetrics.Metric`.

    Examples:
        >>> metric = CalibrationError(num_bins=10)
        >>> logits = torch.tensor([0.8, 0.2]).log().expand(1, 4, 2)
        >>> metric.update(logits, torch.tensor([0, 0, 0, 1]))  # 0.8 confident, 0.75 correct
        >>> metric.compute()
        tensor(0.0500, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    sums: Tensor

    def __init__(self, num_bins: int = 15, **options: Any) -> None:
        super().__init__(**options)
        self.num_bins = _checked_bins(num_bins)
        zeros = torch.zeros(num_bins, 3, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")

    def update(self, draws: Tensor | CategoricalMixture, targets: Tensor | None = None) -> None:
        """Add rows: draws of logits [S, B, C] with class indices [B], or their mixture."""
        mixture = CategoricalMixture.of(draws, targets)
        confidences, predictions = mixture.probabilities.max(-1)
        correct = predictions == _known(mixture.targets)
        self.sums = self.sums + calibration_sums(confidences, correct, self.num_bins)

    def compute(self) -> Tensor:
        """Return the error, a float64 scalar."""
        return CalibrationBins.from_sums(self.sums).error


class AdaptiveCalibrationError(Metric):
    """Expected calibration error over bins of equal numbers of rows, from 0 to 1.

    The bins depend on all rows at once, so the states keep the confidence of every row.

    Args:
        num_bins: The number of bins. Compare only errors with equal numbers of bins.
        options: Options of `torchmetrics.Metric`.

    Examples:
        >>> metric = AdaptiveCalibrationError(num_bins=2)
        >>> logits = torch.tensor([0.8, 0.2]).log().expand(1, 4, 2)
        >>> metric.update(logits, torch.tensor([0, 0, 0, 1]))  # 0.8 confident, 0.75 correct
        >>> metric.compute()
        tensor(0.0500, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    confidences: list[Tensor]
    correct: list[Tensor]

    def __init__(self, num_bins: int = 15, **options: Any) -> None:
        super().__init__(**options)
        self.num_bins = _checked_bins(num_bins)
        self.add_state("confidences", [], dist_reduce_fx="cat")
        self.add_state("correct", [], dist_reduce_fx="cat")

    def update(self, draws: Tensor | CategoricalMixture, targets: Tensor | None = None) -> None:
        """Add rows: draws of logits [S, B, C] with class indices [B], or their mixture."""
        mixture = CategoricalMixture.of(draws, targets)
        confidences, predictions = mixture.probabilities.max(-1)
        self.confidences.append(confidences)
        self.correct.append(predictions == _known(mixture.targets))

    def compute(self) -> Tensor:
        """Return the error, a float64 scalar."""
        confidences, correct = dim_zero_cat(self.confidences), dim_zero_cat(self.correct)
        return adaptive_calibration_error(confidences, correct, self.num_bins)


class GaussianRowMean(RowMean):
    """Base class of metrics of a Gaussian mixture in original units, y = mean + target_std * t.

    Args:
        target_std: The unit of the draws and targets. With 1, the metric has the same unit.
        options: Options of `torchmetrics.Metric`.
    """

    mixture = GaussianMixture

    def __init__(self, target_std: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        if not target_std > 0:
            raise ValueError(
                f"target_std={target_std}: a standard deviation must be positive; choose above 0"
            )
        self.target_std = target_std


class RootMeanSquaredError(GaussianRowMean):
    """Root mean squared error of the mixture's mean, in the unit of the target.

    Examples:
        >>> metric = RootMeanSquaredError(target_std=10.0)
        >>> metric.update(torch.zeros(3, 2, 2), torch.tensor([3.0, 4.0]))
        >>> metric.compute()  # 10 * sqrt((9 + 16) / 2)
        tensor(35.3553, dtype=torch.float64)
    """

    higher_is_better = False

    def rows(self, mixture: GaussianMixture) -> Tensor:
        return (_known(mixture.targets) - mixture.mean).square()

    def compute(self) -> Tensor:
        """Return the error, a float64 scalar."""
        return super().compute().sqrt() * self.target_std


class GaussianNLL(GaussianRowMean):
    """Mean negative log density of the Gaussian with the mixture's moments, in nats.

    A density of y = mean + target_std * t is that of t divided by target_std, which adds its log.

    Examples:
        >>> metric = GaussianNLL()
        >>> metric.update(torch.zeros(3, 2, 2), torch.tensor([0.0, 0.0]))  # N(0; 0, 1)
        >>> metric.compute()
        tensor(0.9189, dtype=torch.float64)
    """

    higher_is_better = False

    def rows(self, mixture: GaussianMixture) -> Tensor:
        return gaussian_nll(mixture.mean, mixture.variance.log(), _known(mixture.targets))

    def compute(self) -> Tensor:
        """Return the mean over all rows, a float64 scalar."""
        return super().compute() + math.log(self.target_std)


class GaussianMixtureNLL(GaussianNLL):
    """Mean negative log density of the mixture itself, in nats.

    Examples:
        >>> metric = GaussianMixtureNLL()
        >>> metric.update(torch.zeros(3, 2, 2), torch.tensor([0.0, 0.0]))
        >>> metric.compute()
        tensor(0.9189, dtype=torch.float64)
    """

    def rows(self, mixture: GaussianMixture) -> Tensor:
        return -_known(mixture.log_likelihood)


class ContinuousRankedProbabilityScore(GaussianRowMean):
    """Mean CRPS of the mixture, in the unit of the target; for one certain draw, |y - mean|.

    torchmetrics' class takes samples of the target, whose score is a random number.

    Examples:
        >>> metric = ContinuousRankedProbabilityScore(target_std=10.0)
        >>> metric.update(torch.zeros(3, 1, 2), torch.zeros(1))  # 10 (sqrt(2) - 1) / sqrt(pi)
        >>> metric.compute()
        tensor(2.3369, dtype=torch.float64)
    """

    higher_is_better = False

    def rows(self, mixture: GaussianMixture) -> Tensor:
        return _known(mixture.crps)

    def compute(self) -> Tensor:
        """Return the mean over all rows, a float64 scalar."""
        return super().compute() * self.target_std


class IntervalScore(GaussianRowMean):
    """Mean interval score of the central interval of the Gaussian with the mixture's moments.

    It is in the unit of the target: the width, and a penalty for targets outside of the interval.

    Args:
        level: The probability inside the interval.
        target_std: The unit of the draws and targets.
        options: Options of `torchmetrics.Metric`.

    Examples:
        >>> metric = IntervalScore(level=0.95)
        >>> metric.update(torch.zeros(3, 1, 2), torch.zeros(1))  # inside: the width
        >>> metric.compute()
        tensor(3.9199, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, level: float = 0.95, target_std: float = 1.0, **options: Any) -> None:
        super().__init__(target_std, variant=f"_{level}", **options)
        self.level = _level(level)

    def rows(self, mixture: GaussianMixture) -> Tensor:
        std = mixture.variance.sqrt()
        return interval_score(mixture.mean, std, _known(mixture.targets), self.level)

    def compute(self) -> Tensor:
        """Return the mean over all rows, a float64 scalar."""
        return super().compute() * self.target_std


class IntervalCoverage(RowMean):
    """Share of targets inside the central interval of the Gaussian with the mixture's moments.

    Args:
        level: The probability inside the interval, which a calibrated prediction covers.
        options: Options of `torchmetrics.Metric`.

    Examples:
        >>> metric = IntervalCoverage(level=0.95)
        >>> metric.update(torch.zeros(3, 2, 2), torch.tensor([1.0, 2.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    mixture = GaussianMixture

    def __init__(self, level: float = 0.95, **options: Any) -> None:
        super().__init__(f"_{level}", **options)
        self.level = _level(level)

    def rows(self, mixture: GaussianMixture) -> Tensor:
        std = mixture.variance.sqrt()
        return inside_interval(mixture.mean, std, _known(mixture.targets), [self.level])[0]


class RootMeanVariance(GaussianRowMean):
    """Root of the mean predicted variance, or of a part of it, comparable with the RMSE.

    Args:
        part: `variance`, `aleatoric` or `epistemic`.
        target_std: The unit of the draws.
        options: Options of `torchmetrics.Metric`.

    Examples:
        >>> metric = RootMeanVariance("epistemic")
        >>> metric.update(torch.tensor([[[1.0, 0.0]], [[5.0, 0.0]]]))  # the means differ by 4
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    def __init__(self, part: str = "variance", target_std: float = 1.0, **options: Any) -> None:
        super().__init__(target_std, variant=f"_{part}", **options)
        parts = ("variance", "aleatoric", "epistemic")
        if part not in parts:
            raise ValueError(f"part={part!r}: choose {', '.join(parts)}")
        self.part = part

    def rows(self, mixture: GaussianMixture) -> Tensor:
        std = self.target_std * getattr(mixture, self.part).sqrt()
        # The square in original units may exceed float64.
        return (std / self.target_std).square()

    def compute(self) -> Tensor:
        """Return the standard deviation, a float64 scalar."""
        return super().compute().sqrt() * self.target_std


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level={level}: a central interval needs a level in (0, 1)")
    return level


def _checked_bins(num_bins: int) -> int:
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}: calibration needs at least one bin")
    return num_bins


def _known(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("targets=None: this metric compares draws with targets; give targets [B]")
    return values
