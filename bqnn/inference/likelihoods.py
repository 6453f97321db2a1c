"""Classification and Regression: how outputs meet targets, in training and in evaluation."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bqnn.arguments import real_number
from bqnn.inference.metrics import (
    Moments,
    brier_score,
    entropy,
    expected_calibration_error,
    gaussian_mixture_nll,
    gaussian_nll,
    interval_coverage,
    log_mean_exp,
    moments,
    mutual_information,
)


class NotFiniteError(ValueError):
    """A metric of finite samples is infinite or NaN.

    metrics: All of them as they are, so that the others are not lost.
    """

    def __init__(self, message: str, metrics: dict[str, float]) -> None:
        super().__init__(message)
        self.metrics = metrics


class Likelihood(ABC):
    """p(target | output): the loss of one draw, and the predictive distribution of many.

    Samples are [S, N, num_outputs]; S may be 1. `metrics` and `summary` compute in float64, on
    the samples' device, and raise ValueError where a sample is not finite. Where finite samples
    lead out of the range of float64, as a log variance of 1000 does, `metrics` and `uncertainty`
    raise the ValueError NotFiniteError, and `convergence` says infinity or NaN.
    """

    heads: tuple[int, ...]  # the number of outputs of each output layer

    @property
    def num_outputs(self) -> int:
        """Outputs of all heads together: one per class, or a mean and a log variance."""
        return sum(self.heads)

    @abstractmethod
    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean negative log-likelihood of one draw [B, num_outputs], in nats and float32."""

    @abstractmethod
    def metrics(self, samples: Tensor, targets: Tensor) -> dict[str, float]:
        """Every metric of the predictive distribution; docs/metrics.md defines each key."""

    @abstractmethod
    def convergence(self, samples: Tensor, targets: Tensor) -> list[dict[str, float]]:
        """The `metrics` of the first draw, of the first two, and so on to all of them.

        From running means, so that the cost grows with the number of draws and not its square.
        """

    @abstractmethod
    def summary(self, samples: Tensor) -> dict[str, Tensor]:
        """The predictive distribution of each row, in the units that a reader wants."""

    @abstractmethod
    def uncertainty(self, summary: Mapping[str, Tensor]) -> dict[str, float]:
        """How uncertain the rows of a summary are on average, and the parts of it; no targets."""

    @abstractmethod
    def scores(self, summary: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is higher for doubtful rows than for others, the usual one first: each [N]."""

    @abstractmethod
    def losses(self, summary: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """What a prediction that was relied on costs: [N]."""


class Classification(Likelihood):
    """A categorical over named classes; outputs are logits, targets int64 class indices."""

    def __init__(self, class_names: Sequence[str]) -> None:
        if len(class_names) < 2:
            raise ValueError(f"class_names={list(class_names)}: give at least two classes")
        self.class_names = tuple(class_names)
        self.heads = (len(self.class_names),)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """-log softmax(output)[target], averaged over the batch."""
        _require_one_target_per_row(output, targets)
        return cross_entropy(output.float(), targets)

    def metrics(self, samples: Tensor, targets: Tensor) -> dict[str, float]:
        """error, nll, brier, ape, mi, ece (15 bins) and ece10 of the mean probability."""
        samples = _checked(samples, self.num_outputs)
        _require_one_target_per_row(samples[0], targets)
        probabilities = samples.softmax(-1)
        found = self._metrics(
            probabilities.mean(0),
            log_mean_exp(_log_likelihood(samples, targets)),
            entropy(probabilities).mean(0),
            targets,
        )
        return _finite(*found)

    def convergence(self, samples: Tensor, targets: Tensor) -> list[dict[str, float]]:
        samples = _checked(samples, self.num_outputs)
        _require_one_target_per_row(samples[0], targets)
        mean = torch.zeros_like(samples[0])
        mean_entropy = torch.zeros_like(samples[0, :, 0])
        log_sum = torch.full_like(mean_entropy, -math.inf)
        steps = []
        for count, draw in enumerate(samples, 1):
            probabilities = draw.softmax(-1)
            mean += (probabilities - mean) / count
            mean_entropy += (entropy(probabilities) - mean_entropy) / count
            log_sum = torch.logaddexp(log_sum, _log_likelihood(draw, targets))
            step, _ = self._metrics(mean, log_sum - math.log(count), mean_entropy, targets)
            steps.append(step)
        return steps

    def summary(self, samples: Tensor) -> dict[str, Tensor]:
        """Mean probabilities [N, C]; entropy and its parts, each [N] and in nats.

        The parts are `aleatoric`, the mean entropy of the draws, and `mutual_information`.
        """
        probabilities = _checked(samples, self.num_outputs).softmax(-1)
        mean = probabilities.mean(0)
        aleatoric = entropy(probabilities).mean(0)
        return {
            "probabilities": mean,
            "entropy": entropy(mean),
            "aleatoric": aleatoric,
            "mutual_information": mutual_information(mean, aleatoric),
        }

    def uncertainty(self, summary: Mapping[str, Tensor]) -> dict[str, float]:
        """ape, and the two parts that it is the sum of: aleatoric and mi."""
        found = _means(
            ape=summary["entropy"],
            aleatoric=summary["aleatoric"],
            mi=summary["mutual_information"],
        )
        return _finite(*found)

    def scores(self, summary: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Entropy, mutual information, and 1 - the largest probability."""
        return {
            "entropy": summary["entropy"],
            "mi": summary["mutual_information"],
            "max_probability": 1 - summary["probabilities"].amax(-1),
        }

    def losses(self, summary: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """1 where the predicted class is wrong, else 0."""
        return (summary["probabilities"].argmax(-1) != targets).double()

    def _metrics(
        self, mean: Tensor, log_likelihood: Tensor, mean_entropy: Tensor, targets: Tensor
    ) -> tuple[dict[str, float], str | None]:
        """mean: probabilities [N, C]; log_likelihood: log of that of the target [N]."""
        confidences, predictions = mean.max(-1)
        correct = predictions == targets
        means, problem = _means(
            error=~correct,
            nll=-log_likelihood,
            brier=brier_score(mean, targets),
            ape=entropy(mean),
            mi=mutual_information(mean, mean_entropy),
        )
        calibration = {
            "ece": expected_calibration_error(confidences, correct, num_bins=15).item(),
            "ece10": expected_calibration_error(confidences, correct, num_bins=10).item(),
        }
        return means | calibration, problem


class Regression(Likelihood):
    """A Gaussian; outputs are its mean and log variance, and targets are standardized.

    `target_mean` and `target_std` lead back to original units: y = target_mean + target_std * t.
    """

    heads = (1, 1)

    def __init__(self, target_mean: float, target_std: float) -> None:
        reason = "is there a gap in the target column?"
        self.target_mean = real_number("target_mean", target_mean, reason)
        reason = "standardizing needs a finite, positive standard deviation; is the target column "
        reason += "constant?"
        self.target_std = real_number("target_std", target_std, reason, 0, without=(0,))

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """-log N(target; mean, variance) in standardized units, averaged over the batch."""
        _require_one_target_per_row(output, targets)
        mean, log_variance = output.float().unbind(-1)
        return gaussian_nll(mean, log_variance, targets).mean()

    def metrics(self, samples: Tensor, targets: Tensor) -> dict[str, float]:
        """rmse, nll, nll_mixture and coverage95, in original units, and two standardized.

        A density of y = m + s t is the density of t divided by s: nll gains log s.
        """
        samples = _checked(samples, self.num_outputs)
        _require_one_target_per_row(samples[0], targets)
        targets = targets.double()
        means, log_variances = samples.unbind(-1)
        mixture_nll = gaussian_mixture_nll(means, log_variances, targets)
        return _finite(*self._metrics(moments(means, log_variances), mixture_nll, targets))

    def convergence(self, samples: Tensor, targets: Tensor) -> list[dict[str, float]]:
        samples = _checked(samples, self.num_outputs)
        _require_one_target_per_row(samples[0], targets)
        targets = targets.double()
        mean, aleatoric, squares = torch.zeros(3, *targets.shape).to(samples)
        log_sum = torch.full_like(mean, -math.inf)
        steps = []
        for count, draw in enumerate(samples, 1):
            draw_mean, log_variance = draw.unbind(-1)
            deviation = draw_mean - mean  # squared deviations as Welford (1962) sums them
            mean = mean + deviation / count
            squares = squares + deviation * (draw_mean - mean)
            aleatoric = aleatoric + (log_variance.exp() - aleatoric) / count
            log_sum = torch.logaddexp(log_sum, -gaussian_nll(draw_mean, log_variance, targets))
            matched = Moments(mean, aleatoric, squares / count)
            step, _ = self._metrics(matched, math.log(count) - log_sum, targets)
            steps.append(step)
        return steps

    def summary(self, samples: Tensor) -> dict[str, Tensor]:
        """mean, aleatoric_std, epistemic_std and their total std, each [N], in original units."""
        matched = moments(*_checked(samples, self.num_outputs).unbind(-1))
        return {
            "mean": self.target_mean + self.target_std * matched.mean,
            "aleatoric_std": self.target_std * matched.aleatoric.sqrt(),
            "epistemic_std": self.target_std * matched.epistemic.sqrt(),
            "std": self.target_std * matched.variance.sqrt(),
        }

    def uncertainty(self, summary: Mapping[str, Tensor]) -> dict[str, float]:
        """The root mean square of std and of its parts, so that their squares add up."""
        # Standardized, since the square in original units may be no float64.
        squares = {
            name: (summary[name] / self.target_std).square()
            for name in ("std", "aleatoric_std", "epistemic_std")
        }
        means, problem = _means(**squares)
        roots = {name: self.target_std * math.sqrt(mean) for name, mean in means.items()}
        return _finite(roots, problem)

    def scores(self, summary: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The predictive standard deviation, and its epistemic part."""
        return {name: summary[name] for name in ("std", "epistemic_std")}

    def losses(self, summary: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """The squared error, in original units."""
        original = self.target_mean + self.target_std * targets.double()
        return (summary["mean"] - original).square()

    def _metrics(
        self, matched: Moments, mixture_nll: Tensor, targets: Tensor
    ) -> tuple[dict[str, float], str | None]:
        means, problem = _means(
            rmse=(targets - matched.mean).square(),
            nll=gaussian_nll(matched.mean, matched.variance.log(), targets),
            nll_mixture=mixture_nll,
        )
        rmse, nll = math.sqrt(means["rmse"]), means["nll"]
        coverage = interval_coverage(matched.mean, matched.variance.sqrt(), targets, [0.95])
        log_std = math.log(self.target_std)
        metrics = {
            "rmse": rmse * self.target_std,
            "nll": nll + log_std,
            "nll_mixture": means["nll_mixture"] + log_std,
            "coverage95": coverage.item(),
            "rmse_standardized": rmse,
            "nll_standardized": nll,
        }
        return metrics, problem


def as_they_are(
    measure: Callable[..., dict[str, float]], *arguments: Any, **options: Any
) -> dict[str, float]:
    """What `measure(...)` returns, or all of its metrics where some are not finite."""
    try:
        return measure(*arguments, **options)
    except NotFiniteError as error:
        return error.metrics


def likelihood_from(facts: Mapping[str, Any]) -> Likelihood:
    """The likelihood that a data set's facts call for; keys it does not need are ignored."""
    match facts:
        case {"likelihood": "classification", "class_names": [*class_names]}:
            return Classification(class_names)
        case {"likelihood": "regression", "target_mean": mean, "target_std": std}:
            return Regression(float(mean), float(std))
    raise ValueError(
        f"facts={dict(facts)}: expected likelihood 'classification' with a list class_names, or "
        "'regression' with target_mean and target_std"
    )


def _checked(samples: Tensor, num_outputs: int) -> Tensor:
    """The samples in float64, once their shape and their values are known to be sound."""
    if samples.ndim != 3 or samples.shape[-1] != num_outputs or samples.numel() == 0:
        raise ValueError(
            f"samples of shape {list(samples.shape)}: expected [S, N, {num_outputs}], "
            "with at least one draw of at least one row"
        )
    if bad := int((~samples.isfinite()).any(-1).any(0).sum()):
        raise ValueError(
            f"nll and every other metric: {bad} of {samples.shape[1]} rows have a non-finite "
            "sample; did training diverge, or a quantizer see no data?"
        )
    return samples.double()


def _require_one_target_per_row(output: Tensor, targets: Tensor) -> None:
    """Refuse shapes that would broadcast [B] against [B, 1] to [B, B] in silence."""
    if targets.shape != output.shape[:-1]:
        raise ValueError(
            f"targets of shape {list(targets.shape)}: expected {list(output.shape[:-1])}, "
            "one per row of the output"
        )


def _log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits [..., N, C]) of the classes [N]: [..., N]."""
    index = targets.expand(logits.shape[:-1]).unsqueeze(-1)
    return logits.gather(-1, index).squeeze(-1) - logits.logsumexp(-1)


def _means(**rows: Tensor) -> tuple[dict[str, float], str | None]:
    """The average of each metric over its rows, and what to say of the first that is not finite."""
    problem = None
    for metric, values in rows.items():
        if problem is None and (bad := int((~values.isfinite()).sum())):
            problem = (
                f"{metric}: {bad} of {len(values)} rows are not finite, although the samples are; "
                "look for a row far from the training rows, or a log variance so large or small "
                "that exp() leaves the range of float64"
            )
    return {metric: values.double().mean().item() for metric, values in rows.items()}, problem


def _finite(metrics: dict[str, float], problem: str | None) -> dict[str, float]:
    if problem is not None:
        raise NotFiniteError(problem, metrics)
    return metrics
