"""Mixtures of draws: the predictive distribution of each row.

Draws have the shape [S, N, num_outputs], and all S draws have equal weight. A mixture stores the
moments that metrics and summaries need, in float64 and on the device of the draws.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Self, TypeVar

import torch
from torch import Tensor

from bqnn.inference.functional import (
    distance_to_earlier,
    entropy,
    expected_distance,
    gaussian_mixture_crps,
    gaussian_nll,
    log_mean_exp,
)


@dataclass(frozen=True, eq=False)
class CategoricalMixture:
    """The mixture of S categorical distributions, for each of N rows.

    Attributes:
        probabilities: Mean class probabilities [N, C].
        expected_entropy: Mean entropy of the draws [N], in nats: the aleatoric part of the
            predictive entropy.
        targets: Class indices [N], where they are known.
        log_likelihood: Log probability of the targets [N], where they are known.

    Examples:
        >>> logits = torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]])  # two draws, one row
        >>> CategoricalMixture.of(logits).probabilities
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """

    probabilities: Tensor
    expected_entropy: Tensor
    targets: Tensor | None = None
    log_likelihood: Tensor | None = None

    @classmethod
    def of(cls, draws: Tensor | Self, targets: Tensor | None = None) -> Self:
        """Mix draws of logits [S, N, C]; a mixture is returned as it is.

        Raises:
            ValueError: A draw is not finite, or the shapes do not fit.
        """
        if isinstance(draws, cls):
            return draws
        assert isinstance(draws, Tensor)
        logits = _checked(draws, targets)
        probabilities = logits.softmax(-1)
        mean, mean_entropy = probabilities.mean(0), entropy(probabilities).mean(0)
        if targets is None:
            return cls(mean, mean_entropy)
        return cls(mean, mean_entropy, targets, log_mean_exp(_log_likelihood(logits, targets)))

    @classmethod
    def running(cls, draws: Tensor, targets: Tensor) -> Iterator[Self]:
        """Yield the mixtures of the first draw, of the first two, and so on to all of them.

        They come from running means: the cost grows with the number of draws and not its square.
        """
        logits = _checked(draws, targets)
        mean = torch.zeros_like(logits[0])
        mean_entropy = torch.zeros_like(logits[0, :, 0])
        log_sum = torch.full_like(mean_entropy, -math.inf)
        for count, draw in enumerate(logits, 1):
            probabilities = draw.softmax(-1)
            mean = mean + (probabilities - mean) / count
            mean_entropy = mean_entropy + (entropy(probabilities) - mean_entropy) / count
            log_sum = torch.logaddexp(log_sum, _log_likelihood(draw, targets))
            yield cls(mean, mean_entropy, targets, log_sum - math.log(count))


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """The mixture of S Gaussian distributions, for each of N rows.

    Attributes:
        mean: Mean of the mixture [N].
        aleatoric: Mean of the draws' variances [N].
        epistemic: Variance of the draws' means [N]. It is divided by S, so it is 0 for S = 1.
        targets: Targets [N] in float64, where they are known.
        log_likelihood: Log density of the targets [N] in nats, where they are known.
        crps: Continuous ranked probability score of the mixture [N], where targets are known.

    Examples:
        >>> draws = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]])  # N(1, 1) and N(3, 1), one row
        >>> mixture = GaussianMixture.of(draws)
        >>> mixture.mean.item(), mixture.aleatoric.item(), mixture.epistemic.item()
        (2.0, 1.0, 1.0)
    """

    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    targets: Tensor | None = None
    log_likelihood: Tensor | None = None
    crps: Tensor | None = None

    @property
    def variance(self) -> Tensor:
        """Law of total variance: E_s[var_s] + Var_s[mean_s], [N]."""
        return self.aleatoric + self.epistemic

    @classmethod
    def of(cls, draws: Tensor | Self, targets: Tensor | None = None) -> Self:
        """Mix draws of a mean and a log variance [S, N, 2]; a mixture is returned as it is.

        Raises:
            ValueError: A draw is not finite, or the shapes do not fit.
        """
        if isinstance(draws, cls):
            return draws
        assert isinstance(draws, Tensor)
        means, log_variances = _checked(draws, targets, num_outputs=2).unbind(-1)
        variances = log_variances.exp()
        moments = (means.mean(0), variances.mean(0), means.var(0, correction=0))
        if targets is None:
            return cls(*moments)
        targets = targets.double()
        log_likelihood = log_mean_exp(-gaussian_nll(means, log_variances, targets))
        crps = gaussian_mixture_crps(means, variances, targets)
        return cls(*moments, targets, log_likelihood, crps)

    @classmethod
    def running(cls, draws: Tensor, targets: Tensor) -> Iterator[Self]:
        """Yield the mixtures of the first draw, of the first two, and so on to all of them.

        They come from running means: the cost grows with the number of draws and not its square.
        """
        samples = _checked(draws, targets, num_outputs=2)
        targets = targets.double()
        means, variances = samples[..., 0], samples[..., 1].exp()
        mean, aleatoric, squares, to_target, between = torch.zeros(5, *targets.shape).to(samples)
        log_sum = torch.full_like(mean, -math.inf)
        for count, draw in enumerate(samples, 1):
            draw_mean, log_variance = draw.unbind(-1)
            deviation = draw_mean - mean  # squared deviations as Welford (1962) sums them
            mean = mean + deviation / count
            squares = squares + deviation * (draw_mean - mean)
            aleatoric = aleatoric + (variances[count - 1] - aleatoric) / count
            log_sum = torch.logaddexp(log_sum, -gaussian_nll(draw_mean, log_variance, targets))
            to_target = to_target + expected_distance(draw_mean - targets, variances[count - 1])
            between = between + distance_to_earlier(means, variances, count - 1)
            crps = to_target / count - between / (2 * count**2)
            log_likelihood = log_sum - math.log(count)
            yield cls(mean, aleatoric, squares / count, targets, log_likelihood, crps)


MixtureOfRows = TypeVar("MixtureOfRows", CategoricalMixture, GaussianMixture)


def mixed_by_count(
    mix: Callable[[Tensor, Tensor | None], MixtureOfRows],
    draws: Tensor,
    num_samples: Tensor,
    targets: Tensor | None,
) -> MixtureOfRows:
    """Mix the draws of rows that made different numbers of them.

    The mixture of a row with n draws is bit-equal to that of the first n draws of all rows.

    Args:
        mix: Mixes draws of rows, with their targets.
        draws: Draws of the output [S, N, num_outputs]; those that a row did not make are ignored.
        num_samples: The number of draws of each row [N].
        targets: Targets [N], or None.

    Examples:
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[9.0, 0.0], [0.0, 0.0]]])
        >>> mixture = mixed_by_count(CategoricalMixture.of, logits, torch.tensor([1, 2]), None)
        >>> mixture.probabilities[0].tolist()  # of the first draw
        [0.5, 0.5]
    """
    num_samples = num_samples.to(draws.device)
    is_made = torch.arange(len(draws), device=draws.device)[:, None] < num_samples
    filled = draws.where(is_made[..., None], 0)
    # All rows are mixed for each number of draws: sums over fewer rows would round otherwise.
    counts, of_row = num_samples.unique(return_inverse=True)
    mixtures = [mix(filled[:count], targets) for count in counts.tolist()]
    columns = {}
    for field in fields(mixtures[0]):
        values = [getattr(mixture, field.name) for mixture in mixtures]
        if values[0] is not None:
            columns[field.name] = torch.stack(values)[of_row, torch.arange(len(of_row))]
    return replace(mixtures[0], **columns)


def require_one_target_per_row(output: Tensor, targets: Tensor) -> None:
    """Raise an error unless there is one target per row; [B, 1] would silently broadcast to [B, B].

    Args:
        output: One draw [B, num_outputs].
        targets: Targets, which must be [B].

    Raises:
        ValueError: The shapes do not fit.
    """
    if targets.shape != output.shape[:-1]:
        raise ValueError(
            f"targets of shape {list(targets.shape)}: expected {list(output.shape[:-1])}, "
            "one per row of the output"
        )


def require_draws(samples: Tensor, num_outputs: int | None = None) -> None:
    """Raise a ValueError unless samples are [S, N, num_outputs], or [S, N, C] for None."""
    fits = samples.dim() == 3 and (num_outputs is None or samples.shape[-1] == num_outputs)
    if not fits or samples.numel() == 0:
        raise ValueError(
            f"samples of shape {list(samples.shape)}: expected [S, N, {num_outputs or 'C'}], "
            "with at least one draw of at least one row"
        )


def numbers_or_all(num_samples: Tensor | None, draws: Tensor) -> Tensor:
    """Return the number of draws of each row [N]: the given one, or all S draws [S, N, ...]."""
    if num_samples is not None:
        return num_samples.to(draws.device)
    return torch.full((draws.shape[1],), len(draws), device=draws.device)


def _checked(samples: Tensor, targets: Tensor | None, num_outputs: int | None = None) -> Tensor:
    """Check shapes and values, and convert the samples to float64."""
    require_draws(samples, num_outputs)
    if bad := int((~samples.isfinite()).any(-1).any(0).sum()):
        raise ValueError(
            f"nll and every other metric: {bad} of {samples.shape[1]} rows have a non-finite "
            "sample; did training diverge, or a quantizer see no data?"
        )
    if targets is not None:
        require_one_target_per_row(samples[0], targets)
    return samples.double()


def _log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute log softmax(logits)[targets] for logits [..., N, C] and targets [N]: [..., N]."""
    index = targets.expand(logits.shape[:-1]).unsqueeze(-1)
    return logits.gather(-1, index).squeeze(-1) - logits.logsumexp(-1)
