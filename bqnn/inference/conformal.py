"""Split conformal prediction: sets of classes and intervals with a known coverage.

A score says how unusual a target is for its prediction. The threshold is a quantile of the scores
of rows that the network was not trained on. A set has every target whose score is at most the
threshold. If these rows and later ones are exchangeable, sets cover a share of 1 - alpha of the
later targets or more, whatever the network (Vovk et al. 2005).
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import torch
from torch import Tensor

from bqnn.arguments import ArgumentError, real_number
from bqnn.inference.functional import gaussian_mixture_quantile
from bqnn.inference.likelihoods import Regression
from bqnn.seeds import Stream, stream_seed
from bqnn.text import short

CLASS_SCORES = ("lac", "aps", "raps")
INTERVAL_SCORES = ("normalized", "cqr")
RAPS_WEIGHT = 0.1  # of the penalty of each class beyond the most probable ones
RAPS_FREE = 2  # the number of classes without a penalty


def conformal_rank(num_rows: int, alpha: float) -> int:
    """Return the rank of the threshold among the scores: ceil((n + 1) (1 - alpha)), from 1.

    Args:
        num_rows: The number n of rows that the threshold is fitted on.
        alpha: The share of targets that sets may miss, between 0 and 1.

    Raises:
        ValueError: Alpha is out of its range, or there are too few rows for it.

    Examples:
        >>> conformal_rank(99, alpha=0.1)
        90
    """
    alpha = real_number("alpha", alpha, "sets miss a share of targets", 0, 1, without=(0, 1))
    rank = math.ceil((num_rows + 1) * (1 - Fraction(str(alpha))))
    if rank > num_rows:
        needed = math.ceil(1 / Fraction(str(alpha))) - 1
        raise ArgumentError(
            f"alpha={alpha}: {num_rows} validation rows are too few for a coverage of "
            f"{1 - alpha:g}; choose a larger share, or keep at least {needed} rows",
            "alpha",
        )
    return rank


def conformal_threshold(scores: Tensor, alpha: float) -> float:
    """Return the threshold of scores [n]: the ceil((n + 1) (1 - alpha))-th smallest.

    Examples:
        >>> conformal_threshold(torch.tensor([0.4, 0.1, 0.3, 0.2]), alpha=0.25)
        0.4000000059604645
    """
    return scores.double().sort().values[conformal_rank(len(scores), alpha) - 1].item()


@dataclass(frozen=True)
class ClassSets:
    """Sets of the classes whose score is at most a threshold.

    Scores depend on the mean class probabilities p:

    - `lac` is 1 - p_c (Sadinle et al. 2019), with the smallest sets on average if p is right.
    - `aps` is the sum of the probabilities above p_c, plus u p_c (Romano et al. 2020), with a
      coverage that depends less on the row. u is uniform in [0, 1), one number per row.
    - `raps` adds 0.1 for each class beyond the two most probable ones, up to c, which avoids large
      sets (Angelopoulos et al. 2021).

    Random numbers make the coverage exact, and sets may be empty. They are the same in every call.

    Args:
        score: `lac`, `aps` or `raps`.
        threshold: The threshold.

    Examples:
        >>> sets = ClassSets("lac", threshold=0.75)
        >>> sets(torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]]))
        tensor([[ True,  True, False],
                [ True, False, False]])
    """

    score: str
    threshold: float

    @classmethod
    def fit(cls, score: str, probabilities: Tensor, targets: Tensor, alpha: float) -> Self:
        """Fit the threshold.

        Args:
            score: `lac`, `aps` or `raps`.
            probabilities: Mean class probabilities [n, C] of rows that were not trained on.
            targets: Their class indices [n].
            alpha: The share of targets that sets may miss.

        Raises:
            ValueError: The score is unknown, alpha is out of range, or there are too few rows.
        """
        scores = class_scores(score, probabilities, _uniform(probabilities, is_fitted_on=True))
        return cls(score, conformal_threshold(scores.gather(1, targets[:, None])[:, 0], alpha))

    def __call__(self, probabilities: Tensor) -> Tensor:
        """Return whether each class is in the set of each row [N, C]."""
        u = _uniform(probabilities, is_fitted_on=False)
        return class_scores(self.score, probabilities, u) <= self.threshold


def class_scores(score: str, probabilities: Tensor, u: Tensor) -> Tensor:
    """Compute the score of each class.

    Args:
        score: `lac`, `aps` or `raps`.
        probabilities: Class probabilities [N, C].
        u: Numbers from 0 to 1 for `aps` and `raps` [N].

    Returns:
        Scores in float64 that are higher for unusual classes [N, C].

    Raises:
        ValueError: The score is unknown.

    Examples:
        >>> class_scores("aps", torch.tensor([[0.25, 0.75]]), u=torch.tensor([0.5]))
        tensor([[0.8750, 0.3750]], dtype=torch.float64)
    """
    if score not in CLASS_SCORES:
        raise ValueError(f"score={short(score)}: choose {', '.join(CLASS_SCORES)}")
    probabilities = probabilities.double()
    if score == "lac":
        return 1 - probabilities
    ordered, classes = probabilities.sort(dim=1, descending=True, stable=True)
    scores = ordered.cumsum(1) - ordered + u[:, None] * ordered
    if score == "raps":
        ranks = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
        scores = scores + RAPS_WEIGHT * (ranks - RAPS_FREE).clamp_min(0)
    return torch.empty_like(scores).scatter_(1, classes, scores)


@dataclass(frozen=True)
class Intervals:
    """Intervals of the targets whose score is at most a threshold.

    - `normalized` is |y - mean| / std, with the moments of the mixture of draws (Papadopoulos et
      al. 2002). Intervals are symmetric, and as wide as the standard deviation times a number.
    - `cqr` is max(l - y, y - u), with the quantiles l and u of the mixture at alpha / 2 and
      1 - alpha / 2, as in conformalized quantile regression (Romano et al. 2019). Every interval
      becomes wider, or narrower, by the same length.

    Args:
        score: `normalized` or `cqr`.
        threshold: The threshold, for `cqr` in standard deviations of the targets.
        alpha: The share of targets that intervals may miss.

    Examples:
        >>> houses = Regression(target_mean=20.0, target_std=2.0)
        >>> Intervals("normalized", 1.5, alpha=0.1)(houses, torch.zeros(3, 1, 2))
        tensor([[17., 23.]], dtype=torch.float64)
    """

    score: str
    threshold: float
    alpha: float

    @classmethod
    def fit(
        cls, score: str, likelihood: Regression, draws: Tensor, targets: Tensor, alpha: float
    ) -> Self:
        """Fit the threshold.

        Args:
            score: `normalized` or `cqr`.
            likelihood: The likelihood of the network's outputs.
            draws: Draws of mean and log variance [S, n, 2] of rows that were not trained on.
            targets: Their standardized targets [n].
            alpha: The share of targets that intervals may miss.

        Raises:
            ValueError: The score is unknown, alpha is out of range, or there are too few rows.
        """
        lower, upper, unit = _interval(score, likelihood, draws, alpha)
        targets = targets.double()
        outside = torch.maximum(lower - targets, targets - upper) / unit
        return cls(score, conformal_threshold(outside, alpha), alpha)

    def __call__(self, likelihood: Regression, draws: Tensor) -> Tensor:
        """Return the ends of each interval in original units [N, 2].

        An interval is empty, with its ends in the wrong order, if a negative threshold of `cqr`
        exceeds half of its width.
        """
        lower, upper, unit = _interval(self.score, likelihood, draws, self.alpha)
        ends = torch.stack([lower - self.threshold * unit, upper + self.threshold * unit], -1)
        return likelihood.target_mean + likelihood.target_std * ends


def _interval(
    score: str, likelihood: Regression, draws: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ends of the intervals that are widened, and the unit of their widening, [N]."""
    mixture = likelihood.mixture(draws)
    if score == "normalized":
        return mixture.mean, mixture.mean, mixture.variance.sqrt()
    if score == "cqr":
        means, log_variances = draws.double().unbind(-1)
        lower, upper = (
            gaussian_mixture_quantile(means, log_variances.exp(), level)
            for level in (alpha / 2, 1 - alpha / 2)
        )
        return lower, upper, torch.ones_like(lower)
    raise ValueError(f"score={short(score)}: choose {', '.join(INTERVAL_SCORES)}")


def _uniform(rows: Tensor, *, is_fitted_on: bool) -> Tensor:
    """Draw a number for each row [N], others for rows that a threshold is fitted on."""
    seed = stream_seed(0, Stream.CONFORMAL, 0 if is_fitted_on else 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(rows), dtype=torch.float64, generator=generator).to(rows.device)
