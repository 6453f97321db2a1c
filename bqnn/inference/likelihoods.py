"""Likelihoods: the loss, the predictive distribution and the metrics of a kind of target."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bqnn.arguments import real_number
from bqnn.inference.answers import ClassificationAnswer, RegressionAnswer
from bqnn.inference.functional import entropy, gaussian_nll, half_width, mutual_information
from bqnn.inference.metrics import (
    AdaptiveCalibrationError,
    BrierScore,
    CalibrationError,
    CategoricalNLL,
    ContinuousRankedProbabilityScore,
    ErrorRate,
    ExpectedEntropy,
    GaussianMixtureNLL,
    GaussianNLL,
    IntervalCoverage,
    IntervalScore,
    Mixture,
    MixtureMetrics,
    MutualInformation,
    PredictiveEntropy,
    RootMeanSquaredError,
    RootMeanVariance,
)
from bqnn.inference.mixtures import (
    CategoricalMixture,
    GaussianMixture,
    mixed_by_count,
    numbers_or_all,
    require_draws,
    require_one_target_per_row,
)


class Likelihood(ABC):
    """Base class of likelihoods p(target | output).

    Draws are [S, N, num_outputs]; S may be 1. All methods except `loss` compute in float64, on the
    device of the draws. Methods that take draws also take their mixture, and raise a ValueError if
    a draw is not finite.

    Attributes:
        heads: The number of outputs of each output layer.
    """

    heads: tuple[int, ...]

    @property
    def num_outputs(self) -> int:
        """Outputs of all heads together: one per class, or a mean and a log variance."""
        return sum(self.heads)

    @abstractmethod
    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean negative log-likelihood of one draw, in nats and float32.

        Args:
            output: One draw [B, num_outputs].
            targets: Targets [B].
        """

    @abstractmethod
    def expected_loss(self, output: Tensor, other: Tensor) -> Tensor:
        """Compute the mean of `loss` over targets that another output predicts.

        It is least where both outputs give the same distribution, with the entropy of it.

        Args:
            output: One draw [B, num_outputs].
            other: The output that predicts the targets, [B, num_outputs].
        """

    @abstractmethod
    def fisher_factors(self, output: Tensor) -> Tensor:
        """Factorize the Fisher information of the outputs of one draw.

        The Fisher information of a row is the sum over k of f_k f_k^T, where f_k is factor k. It is
        the expected Hessian of the negative log-likelihood.

        Args:
            output: One draw [B, num_outputs].

        Returns:
            The factors [K, B, num_outputs].
        """

    @abstractmethod
    def mixture(
        self,
        draws: Tensor | Mixture,
        targets: Tensor | None = None,
        num_samples: Tensor | None = None,
    ) -> Mixture:
        """Mix draws to the predictive distribution of each row; a mixture is returned as it is.

        Args:
            draws: Draws of the output [S, N, num_outputs].
            targets: Targets [N], or None.
            num_samples: The number of draws of each row [N]; None for S.
        """

    @abstractmethod
    def is_settled(self, draws: Tensor, tolerance: float) -> Tensor:
        """Judge rows by their draws: whether further draws would hardly change the answer.

        Args:
            draws: The draws so far [n, N, num_outputs], at least 2.
            tolerance: What counts as a small change.

        Returns:
            Booleans [N].
        """

    @abstractmethod
    def running_mixtures(self, draws: Tensor, targets: Tensor) -> Iterator[Mixture]:
        """Yield the mixtures of the first draw, of the first two, and so on to all of them."""

    @abstractmethod
    def metrics(self, **options: Any) -> MixtureMetrics:
        """Collect every metric of draws and targets; docs/metrics.md defines each key.

        Args:
            options: Options of `torchmetrics.Metric`, such as `sync_on_compute`.
        """

    @abstractmethod
    def uncertainty(self, **options: Any) -> MixtureMetrics:
        """Collect the metrics of the uncertainty of draws, which need no targets.

        Args:
            options: Options of `torchmetrics.Metric`, such as `sync_on_compute`.
        """

    @abstractmethod
    def summary(self, draws: Tensor | Mixture) -> dict[str, Tensor]:
        """Summarize the predictive distribution of each row, in original units."""

    @abstractmethod
    def answer(
        self, draws: Tensor, num_samples: Tensor | None = None
    ) -> ClassificationAnswer | RegressionAnswer:
        """Return the summary of draws, and the prediction of each draw.

        Args:
            draws: Draws of the output [S, N, num_outputs].
            num_samples: The number of draws of each row [N]; None for S.
        """

    def _of_each_draw(self, name: str, draws: Tensor, num_samples: Tensor) -> Tensor:
        """Return an entry of the summary for each draw [S, N, ...], NaN where there is none."""
        is_made = torch.arange(len(draws), device=draws.device)[:, None] < num_samples
        values = self.summary(draws[is_made].unsqueeze(0))[name]
        if is_made.all():
            return values.reshape(*is_made.shape, *values.shape[1:])
        of_each = values.new_full((*is_made.shape, *values.shape[1:]), torch.nan)
        of_each[is_made] = values
        return of_each

    @abstractmethod
    def scores(self, summary: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute scores that are higher for uncertain rows, each [N]; the default comes first."""

    @abstractmethod
    def losses(self, summary: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Compute the loss of each prediction [N], for the risk-coverage curve."""

    def convergence(self, draws: Tensor, targets: Tensor) -> list[dict[str, float]]:
        """Compute the metrics of the first draw, of the first two, and so on to all of them.

        A metric of finite draws that is infinite or NaN raises no error.

        Args:
            draws: Draws of the output [S, N, num_outputs].
            targets: Targets [N].

        Returns:
            The metrics after 1, 2, ..., S draws.
        """
        metrics = self.metrics(sync_on_compute=False)
        steps = []
        for mixture in self.running_mixtures(draws, targets):
            metrics.reset()
            metrics.update(mixture)
            steps.append(metrics.numbers())
        return steps


class Classification(Likelihood):
    """A categorical over named classes. Outputs are logits, targets int64 class indices.

    Examples:
        >>> import torch
        >>> likelihood = Classification(["cat", "dog"])
        >>> metrics = likelihood.metrics()
        >>> metrics.update(torch.zeros(3, 5, 2), torch.tensor([0, 1, 1, 0, 1]))
        >>> list(metrics.compute())
        ['error', 'nll', 'brier', 'ape', 'mi', 'ece', 'ece10', 'ece_adaptive']
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        if len(class_names) < 2:
            raise ValueError(f"class_names={list(class_names)}: give at least two classes")
        self.class_names = tuple(class_names)
        self.heads = (len(self.class_names),)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Compute -log softmax(output)[target], averaged over the batch."""
        require_one_target_per_row(output, targets)
        return cross_entropy(output.float(), targets)

    def expected_loss(self, output: Tensor, other: Tensor) -> Tensor:
        return cross_entropy(output.float(), other.float().softmax(-1))

    def fisher_factors(self, output: Tensor) -> Tensor:
        """Compute sqrt(p_k) (e_k - p), whose outer products sum to diag(p) - p p^T."""
        probabilities = output.softmax(-1)
        directions = torch.eye(self.num_outputs).to(output)[:, None] - probabilities
        return probabilities.t()[..., None].sqrt() * directions

    def mixture(
        self,
        draws: Tensor | Mixture,
        targets: Tensor | None = None,
        num_samples: Tensor | None = None,
    ) -> CategoricalMixture:
        if isinstance(draws, Tensor):
            require_draws(draws, self.num_outputs)
            if num_samples is not None:
                return mixed_by_count(CategoricalMixture.of, draws, num_samples, targets)
        assert not isinstance(draws, GaussianMixture)
        return CategoricalMixture.of(draws, targets)

    def is_settled(self, draws: Tensor, tolerance: float) -> Tensor:
        """Judge entropy and decision by their 95 % confidence intervals over the draws p_s.

        A row has settled if the interval of its entropy is within +- `tolerance` nats, and that of
        the margin between its two most probable classes a and b does not contain 0. To first order,
        the entropy of the mean p is the mean of the cross-entropies -sum_c p_sc log p_c, and the
        margin is that of p_sa - p_sb.
        """
        probabilities = draws.double().softmax(-1)
        mean = probabilities.mean(0)
        cross_entropies = -torch.xlogy(probabilities, mean).sum(-1)
        best = mean.topk(2).indices.expand(len(draws), -1, 2)
        first, second = probabilities.gather(-1, best).unbind(-1)
        margins = first - second
        is_certain = half_width(margins) <= margins.mean(0)
        return is_certain & (half_width(cross_entropies) <= tolerance)

    def running_mixtures(self, draws: Tensor, targets: Tensor) -> Iterator[Mixture]:
        require_draws(draws, self.num_outputs)
        return CategoricalMixture.running(draws, targets)

    def metrics(self, **options: Any) -> MixtureMetrics:
        """Collect error, nll, brier, ape, mi, and three calibration errors of the mixture.

        These are ece (15 bins of equal width), ece10 (10 bins) and ece_adaptive (15 bins of equal
        numbers of rows).
        """
        return MixtureMetrics(
            self.mixture,
            {
                "error": ErrorRate(**options),
                "nll": CategoricalNLL(**options),
                "brier": BrierScore(**options),
                "ape": PredictiveEntropy(**options),
                "mi": MutualInformation(**options),
                "ece": CalibrationError(15, **options),
                "ece10": CalibrationError(10, **options),
                "ece_adaptive": AdaptiveCalibrationError(15, **options),
            },
        )

    def uncertainty(self, **options: Any) -> MixtureMetrics:
        """Collect ape and its two parts, aleatoric and mi, which sum to it."""
        return MixtureMetrics(
            self.mixture,
            {
                "ape": PredictiveEntropy(**options),
                "aleatoric": ExpectedEntropy(**options),
                "mi": MutualInformation(**options),
            },
        )

    def summary(self, draws: Tensor | Mixture) -> dict[str, Tensor]:
        """Compute mean probabilities [N, C], and entropy and its parts, each [N] and in nats.

        The parts are `aleatoric`, the mean entropy of the draws, and `mutual_information`.
        """
        mixture = self.mixture(draws)
        return {
            "probabilities": mixture.probabilities,
            "entropy": entropy(mixture.probabilities),
            "aleatoric": mixture.expected_entropy,
            "mutual_information": mutual_information(
                mixture.probabilities, mixture.expected_entropy
            ),
        }

    def answer(self, draws: Tensor, num_samples: Tensor | None = None) -> ClassificationAnswer:
        summary = self.summary(self.mixture(draws, None, num_samples))
        counts = numbers_or_all(num_samples, draws)
        return ClassificationAnswer(
            samples=self._of_each_draw("probabilities", draws, counts),
            num_samples=counts,
            labels=summary["probabilities"].argmax(-1),
            class_names=self.class_names,
            **summary,
        )

    def scores(self, summary: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute entropy, mutual information, and 1 - the largest probability."""
        return {
            "entropy": summary["entropy"],
            "mi": summary["mutual_information"],
            "max_probability": 1 - summary["probabilities"].amax(-1),
        }

    def losses(self, summary: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Compute 1 where the predicted class is wrong, else 0."""
        return (summary["probabilities"].argmax(-1) != targets).double()


class Regression(Likelihood):
    """A Gaussian. Outputs are its mean and log variance, and targets are standardized.

    Args:
        target_mean: With target_std, leads back to original units: y = target_mean + target_std t.
        target_std: The standard deviation of the targets that the network was trained on.

    Examples:
        >>> import torch
        >>> likelihood = Regression(target_mean=20.0, target_std=2.0)
        >>> metrics = likelihood.metrics()
        >>> metrics.update(torch.zeros(3, 5, 2), torch.ones(5))
        >>> metrics.compute()["rmse"]
        tensor(2., dtype=torch.float64)
    """

    heads = (1, 1)

    def __init__(self, target_mean: float, target_std: float) -> None:
        reason = "is there a gap in the target column?"
        self.target_mean = real_number("target_mean", target_mean, reason)
        reason = "standardizing needs a finite, positive standard deviation; is the target column "
        reason += "constant?"
        self.target_std = real_number("target_std", target_std, reason, 0, without=(0,))

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Compute -log N(target; mean, variance) in standardized units, averaged over the batch."""
        require_one_target_per_row(output, targets)
        mean, log_variance = output.float().unbind(-1)
        return gaussian_nll(mean, log_variance, targets).mean()

    def expected_loss(self, output: Tensor, other: Tensor) -> Tensor:
        mean, log_variance = output.float().unbind(-1)
        targets, log_noise = other.float().unbind(-1)
        noise = torch.exp(log_noise - log_variance) / 2  # of targets around their mean
        return (gaussian_nll(mean, log_variance, targets) + noise).mean()

    def fisher_factors(self, output: Tensor) -> Tensor:
        """Compute (1 / std, 0) and (0, sqrt(1/2)), the factors of diag(1 / variance, 1/2)."""
        of_mean = torch.exp(-0.5 * output[:, 1])
        of_log_variance = torch.full_like(of_mean, 0.5**0.5)
        return torch.stack([of_mean, of_log_variance])[..., None] * torch.eye(2).to(output)[:, None]

    def mixture(
        self,
        draws: Tensor | Mixture,
        targets: Tensor | None = None,
        num_samples: Tensor | None = None,
    ) -> GaussianMixture:
        """Mix draws, in standardized units."""
        if isinstance(draws, Tensor) and num_samples is not None:
            require_draws(draws, self.num_outputs)
            return mixed_by_count(GaussianMixture.of, draws, num_samples, targets)
        assert not isinstance(draws, CategoricalMixture)
        return GaussianMixture.of(draws, targets)

    def is_settled(self, draws: Tensor, tolerance: float) -> Tensor:
        """Judge mean and standard deviation by their 95 % confidence intervals over the draws.

        A row has settled if both intervals are within +- `tolerance` times the predictive standard
        deviation s. Its variance s^2 is the mean of v_s + (m_s - m)^2 over draws of a mean m_s and
        a variance v_s, and the interval of s is that of s^2 divided by 2 s, to first order.
        """
        means, log_variances = draws.double().unbind(-1)
        squares = log_variances.exp() + (means - means.mean(0)).square()
        variance = squares.mean(0)
        return (half_width(means) <= tolerance * variance.sqrt()) & (
            half_width(squares) / 2 <= tolerance * variance
        )

    def running_mixtures(self, draws: Tensor, targets: Tensor) -> Iterator[Mixture]:
        return GaussianMixture.running(draws, targets)

    def metrics(self, **options: Any) -> MixtureMetrics:
        """Collect rmse, nll, nll_mixture, coverage95, crps and interval_score95 in original units.

        rmse and nll are also there in standardized units.
        """
        std = self.target_std
        return MixtureMetrics(
            self.mixture,
            {
                "rmse": RootMeanSquaredError(std, **options),
                "nll": GaussianNLL(std, **options),
                "nll_mixture": GaussianMixtureNLL(std, **options),
                "coverage95": IntervalCoverage(0.95, **options),
                "rmse_standardized": RootMeanSquaredError(**options),
                "nll_standardized": GaussianNLL(**options),
                "crps": ContinuousRankedProbabilityScore(std, **options),
                "interval_score95": IntervalScore(0.95, std, **options),
            },
        )

    def uncertainty(self, **options: Any) -> MixtureMetrics:
        """Collect the root mean squares of std and of its two parts; their squares sum to std's."""
        parts = {"std": "variance", "aleatoric_std": "aleatoric", "epistemic_std": "epistemic"}
        return MixtureMetrics(
            self.mixture,
            {
                name: RootMeanVariance(part, self.target_std, **options)
                for name, part in parts.items()
            },
        )

    def summary(self, draws: Tensor | Mixture) -> dict[str, Tensor]:
        """Compute mean, aleatoric_std, epistemic_std and their total std in original units [N]."""
        mixture = self.mixture(draws)
        return {
            "mean": self.target_mean + self.target_std * mixture.mean,
            "aleatoric_std": self.target_std * mixture.aleatoric.sqrt(),
            "epistemic_std": self.target_std * mixture.epistemic.sqrt(),
            "std": self.target_std * mixture.variance.sqrt(),
        }

    def answer(self, draws: Tensor, num_samples: Tensor | None = None) -> RegressionAnswer:
        summary = self.summary(self.mixture(draws, None, num_samples))
        counts = numbers_or_all(num_samples, draws)
        return RegressionAnswer(
            samples=self._of_each_draw("mean", draws, counts),
            num_samples=counts,
            mean=summary["mean"],
            std=summary["std"],
            aleatoric=summary["aleatoric_std"],
            epistemic=summary["epistemic_std"],
        )

    def scores(self, summary: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the predictive standard deviation, and its epistemic part."""
        return {name: summary[name] for name in ("std", "epistemic_std")}

    def losses(self, summary: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Compute the squared error, in original units."""
        original = self.target_mean + self.target_std * targets.double()
        return (summary["mean"] - original).square()


def likelihood_from(facts: Mapping[str, Any]) -> Likelihood:
    """Build the likelihood that a data set's facts call for; other keys are ignored.

    Examples:
        >>> likelihood_from({"likelihood": "classification", "class_names": ["a", "b"]}).heads
        (2,)
    """
    match facts:
        case {"likelihood": "classification", "class_names": [*class_names]}:
            return Classification(class_names)
        case {"likelihood": "regression", "target_mean": mean, "target_std": std}:
            return Regression(float(mean), float(std))
    raise ValueError(
        f"facts={dict(facts)}: expected likelihood 'classification' with a list class_names, or "
        "'regression' with target_mean and target_std"
    )
