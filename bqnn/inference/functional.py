"""Functional forms of the metrics.

Functions that score rows return one value per row. Entropies and log-likelihoods are in nats. The
classes in `bqnn.inference.metrics` use these functions.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def log_mean_exp(values: Tensor) -> Tensor:
    """Compute `log(mean(exp(values)))` over the first axis without overflow.

    Examples:
        >>> log_mean_exp(torch.tensor([1000.0, 1000.0]))
        tensor(1000.)
    """
    return values.logsumexp(0) - math.log(len(values))


def half_width(values: Tensor) -> Tensor:
    """Compute half the width of the 95 % confidence interval of the mean over the first axis.

    The interval is Student's: its half width is t s / sqrt(n), where s is the sample standard
    deviation and t the 97.5 % quantile of Student's distribution with n - 1 degrees of freedom.

    Args:
        values: n independent values [n, ...], at least 2.

    Examples:
        >>> half_width(torch.tensor([1.0, 3.0]))  # t is 12.71
        tensor(12.7062)
    """
    from scipy.special import stdtrit

    count = len(values)
    return values.std(0) * (float(stdtrit(count - 1, 0.975)) / math.sqrt(count))


def entropy(probabilities: Tensor) -> Tensor:
    """Compute the entropy over the last axis, with 0 log 0 = 0.

    Args:
        probabilities: Class probabilities [..., C].

    Returns:
        H[p] = -sum_c p_c log p_c in nats, [...].

    Examples:
        >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.6931, 0.0000])
    """
    terms: Tensor = torch.special.entr(probabilities)
    return terms.sum(-1)


def mutual_information(mean: Tensor, mean_entropy: Tensor) -> Tensor:
    """Compute the mutual information of label and weights, the disagreement of the draws.

    I[y; w] = H[E_s p_s] - E_s H[p_s] is the epistemic part of the predictive entropy (Depeweg et
    al. 2018). It is 0 for one draw. Rounding errors below zero are clipped.

    Args:
        mean: The draws' mean probabilities [N, C].
        mean_entropy: The mean of the draws' entropies [N], in nats.

    Returns:
        The mutual information of label and weights [N], in nats.

    Examples:
        >>> draws = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # two certain draws, one row
        >>> mutual_information(draws.mean(0), entropy(draws).mean(0))
        tensor([0.6931])
    """
    return (entropy(mean) - mean_entropy).clamp_min(0)


def brier_score(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Compute the Brier score of each row, from 0 to 2.

    Args:
        probabilities: Class probabilities [N, C].
        targets: Class indices [N].

    Returns:
        sum_c (p_c - [y = c])^2, [N].

    Examples:
        >>> brier_score(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 1]))
        tensor([0.5000, 2.0000])
    """
    one_hot = torch.nn.functional.one_hot(targets, probabilities.shape[-1])
    return (probabilities - one_hot).square().sum(-1)


class CalibrationBins(NamedTuple):
    """The bins of a reliability diagram, one entry per bin [B]. Empty bins are all zeros."""

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @classmethod
    def from_sums(cls, sums: Tensor) -> "CalibrationBins":
        """Divide the output of `calibration_sums` by the number of rows in each bin."""
        counts, confidence, accuracy = sums.unbind(-1)
        divisor = counts.clamp_min(1)
        return cls(counts.long(), confidence / divisor, accuracy / divisor)

    @property
    def error(self) -> Tensor:
        """ECE = sum_b n_b / N |accuracy_b - confidence_b|, from 0 to 1 (Guo et al. 2017)."""
        gaps = (self.accuracy - self.confidence).abs()
        return (self.counts * gaps).sum() / self.counts.sum()


def calibration_sums(confidences: Tensor, correct: Tensor, num_bins: int) -> Tensor:
    """Sum rows in the equal-width bins ((b-1)/B, b/B].

    A confidence of exactly 1.0 lies in the last bin, one of exactly 0.0 in the first.

    Args:
        confidences: The probability of each predicted class [N].
        correct: Whether the predicted class is the target [N].
        num_bins: The number of bins B.

    Returns:
        The number of rows, the sum of confidences and the number of correct rows of each bin,
        [B, 3] in float64.

    Raises:
        ValueError: `num_bins` is below 1.

    Examples:
        >>> calibration_sums(torch.tensor([0.25, 1.0]), torch.tensor([False, True]), num_bins=2)
        tensor([[1.0000, 0.2500, 0.0000],
                [1.0000, 1.0000, 1.0000]], dtype=torch.float64)
    """
    _require_bins(num_bins)
    confidences = confidences.double()
    inner_edges = torch.linspace(
        0, 1, num_bins + 1, dtype=confidences.dtype, device=confidences.device
    )[1:-1]
    bins = torch.bucketize(confidences, inner_edges)
    rows = torch.stack([torch.ones_like(confidences), confidences, correct.double()], -1)
    # bincount with weights has no deterministic CUDA kernel.
    return rows.new_zeros(num_bins, 3).index_add_(0, bins, rows)


def calibration_bins(confidences: Tensor, correct: Tensor, num_bins: int) -> CalibrationBins:
    """Compute the bins of a reliability diagram.

    Args:
        confidences: The probability of each predicted class [N].
        correct: Whether the predicted class is the target [N].
        num_bins: The number of equal-width bins; `calibration_sums` defines their edges.

    Returns:
        Count, mean confidence and accuracy of each bin. `error` is the calibration error.

    Examples:
        >>> bins = calibration_bins(torch.tensor([0.9, 0.9]), torch.tensor([True, False]), 2)
        >>> bins.counts, round(bins.error.item(), 3)
        (tensor([0, 2]), 0.4)
    """
    return CalibrationBins.from_sums(calibration_sums(confidences, correct, num_bins))


def adaptive_calibration_error(confidences: Tensor, correct: Tensor, num_bins: int) -> Tensor:
    """Compute the expected calibration error over bins of equal numbers of rows.

    Rows are sorted by confidence and divided into consecutive bins, whose sizes differ by at most
    one (Nguyen & O'Connor 2015). Rows of equal confidence have no order: each counts as correct by
    the share of them that is.

    Args:
        confidences: The probability of each predicted class [N].
        correct: Whether the predicted class is the target [N].
        num_bins: The number of bins B. Rows are bins of their own if there are fewer.

    Returns:
        sum_b n_b / N |accuracy_b - confidence_b|, a float64 scalar from 0 to 1.

    Raises:
        ValueError: `num_bins` is below 1.

    Examples:
        >>> confidences = torch.tensor([0.9, 0.9, 0.8, 0.8], dtype=torch.float64)
        >>> correct = torch.tensor([True, False, True, True])
        >>> adaptive_calibration_error(confidences, correct, num_bins=2)  # 0.4 / 2 + 0.2 / 2
        tensor(0.3000, dtype=torch.float64)
    """
    _require_bins(num_bins)
    confidences = confidences.double()
    gaps = sorted_by(confidences, correct) - confidences.sort().values
    bins = gaps.tensor_split(num_bins)
    return torch.stack([of_bin.sum().abs() for of_bin in bins]).sum() / len(gaps)


def gaussian_nll(mean: Tensor, log_variance: Tensor, targets: Tensor) -> Tensor:
    """Compute -log N(target; mean, variance) elementwise, in nats.

    The constant 0.5 log(2 pi) is included.

    Args:
        mean: Predicted means [...].
        log_variance: Logarithms of the predicted variances [...].
        targets: Targets [...].

    Examples:
        >>> gaussian_nll(torch.zeros(1), torch.zeros(1), torch.tensor([1.0]))
        tensor([1.4189])
    """
    squared_z = (targets - mean).square() * torch.exp(-log_variance)
    return 0.5 * (math.log(2 * math.pi) + log_variance + squared_z)


def inside_interval(mean: Tensor, std: Tensor, targets: Tensor, levels: Sequence[float]) -> Tensor:
    """Test whether targets lie in the central intervals of N(mean, std^2).

    Args:
        mean: Predicted means [N].
        std: Predicted standard deviations [N].
        targets: Targets [N].
        levels: Probabilities inside the intervals, each between 0 and 1. The interval of level q
            is mean +- Phi^-1((1 + q) / 2) std.

    Returns:
        A boolean for each level and row [L, N].

    Raises:
        ValueError: A level is not between 0 and 1.

    Examples:
        >>> targets = torch.tensor([0.0, 1.0, 2.0])
        >>> inside_interval(torch.zeros(3), torch.ones(3), targets, [0.95])
        tensor([[ True,  True, False]])
    """
    return (targets - mean).abs() <= _half_widths(levels, targets)[:, None] * std


def interval_coverage(
    mean: Tensor, std: Tensor, targets: Tensor, levels: Sequence[float]
) -> Tensor:
    """Compute the share of targets in the central intervals of N(mean, std^2), for each level [L].

    The arguments are those of `inside_interval`. Calibrated predictions cover a share q of the
    targets at level q.

    Examples:
        >>> targets = torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> interval_coverage(torch.zeros(4), torch.ones(4), targets, [0.5, 0.95])
        tensor([0.2500, 0.5000], dtype=torch.float64)
    """
    return inside_interval(mean, std, targets, levels).double().mean(-1)


def interval_score(mean: Tensor, std: Tensor, targets: Tensor, level: float) -> Tensor:
    """Compute the interval score of the central interval of N(mean, std^2) for each row.

    It is the width of the interval [l, u] plus 2 / alpha times the distance of a target outside of
    it, with alpha = 1 - level (Gneiting & Raftery 2007). The true quantiles minimize its mean.

    Args:
        mean: Predicted means [N].
        std: Predicted standard deviations [N].
        targets: Targets [N].
        level: The probability inside the interval, between 0 and 1.

    Returns:
        u - l + 2 / alpha (l - y)_+ + 2 / alpha (y - u)_+ in the unit of the targets, [N].

    Raises:
        ValueError: The level is not between 0 and 1.

    Examples:
        >>> zeros, ones = torch.zeros(2), torch.ones(2)
        >>> interval_score(zeros, ones, torch.tensor([0.0, 3.0]), level=0.95)
        tensor([ 3.9199, 45.5214], dtype=torch.float64)
    """
    half_width = _half_widths([level], targets)[0] * std.double()
    outside = ((targets - mean).abs() - half_width).clamp_min(0)
    return 2 * half_width + 2 / (1 - level) * outside


def expected_distance(mean: Tensor, variance: Tensor) -> Tensor:
    """Compute E|z| of z ~ N(mean, variance), elementwise.

    E|z| = m erf(m / sqrt(2 v)) + sqrt(2 v / pi) exp(-m^2 / (2 v)).

    Examples:
        >>> expected_distance(torch.zeros(1), torch.ones(1))  # sqrt(2 / pi)
        tensor([0.7979])
    """
    width = (2 * variance).sqrt()
    z = mean / width
    distance: Tensor = mean * z.erf() + width * torch.exp(-z.square()) / math.sqrt(math.pi)
    return distance


def distance_to_earlier(means: Tensor, variances: Tensor, index: int) -> Tensor:
    """Sum E|x_i - x_j| of draw i with the draws j <= i, and of the draws j < i with draw i.

    The sums of all draws add up to those of all S^2 pairs of independent x_i and x_j.

    Args:
        means: The mean of each draw [S, N].
        variances: The variance of each draw [S, N].
        index: The index i of a draw.

    Returns:
        The sum of the 2 i + 1 distances, [N].
    """
    distances = expected_distance(
        means[index] - means[: index + 1], variances[index] + variances[: index + 1]
    )
    return 2 * distances.sum(0) - distances[-1]


def gaussian_mixture_crps(means: Tensor, variances: Tensor, targets: Tensor) -> Tensor:
    """Compute the continuous ranked probability score of a mixture of S Gaussians for each row.

    CRPS = E|x - y| - E|x - x'| / 2 with independent x and x' of the mixture (Gneiting & Raftery
    2007), in closed form (Grimit et al. 2006). The time grows with S^2.

    Args:
        means: The mean of each draw [S, N].
        variances: The variance of each draw [S, N].
        targets: Targets [N].

    Returns:
        The score in the unit of the targets, 0 or more, [N].

    Examples:
        >>> gaussian_mixture_crps(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1))
        tensor([0.2337])
    """
    to_target = expected_distance(means - targets, variances).mean(0)
    between = torch.zeros_like(to_target)
    for index in range(len(means)):
        between = between + distance_to_earlier(means, variances, index)
    return to_target - between / (2 * len(means) ** 2)


def gaussian_mixture_quantile(means: Tensor, variances: Tensor, level: float) -> Tensor:
    """Compute a quantile of a mixture of S Gaussians for each row, by bisection.

    Args:
        means: The mean of each draw [S, N].
        variances: The variance of each draw [S, N].
        level: The probability below the quantile, between 0 and 1.

    Returns:
        The quantiles in float64, [N].

    Examples:
        >>> gaussian_mixture_quantile(torch.zeros(2, 1), torch.ones(2, 1), level=0.975)
        tensor([1.9600], dtype=torch.float64)
    """
    means, std = means.double(), variances.double().sqrt()
    of_draws = means + std * torch.special.ndtri(torch.tensor(level, dtype=torch.float64))
    lower, upper = of_draws.amin(0), of_draws.amax(0)  # the quantile is between those of the draws
    for _ in range(60):
        middle = (lower + upper) / 2
        is_below = torch.special.ndtr((middle - means) / std).mean(0) < level
        lower, upper = torch.where(is_below, middle, lower), torch.where(is_below, upper, middle)
    return (lower + upper) / 2


def risk_coverage(scores: Tensor, losses: Tensor) -> Tensor:
    """Compute the mean loss of the 1, 2, ..., N rows with the lowest scores.

    Rows of equal score have no order: the curve is its expectation over all their orders. Its mean
    is the area under it (AURC, Geifman & El-Yaniv 2017).

    Args:
        scores: Values that are higher for doubtful rows [N].
        losses: The loss of each row [N].

    Returns:
        The risk at coverage 1/N, 2/N, ..., 1, in float64 [N].

    Examples:
        >>> risk_coverage(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.0, 1.0, 0.5]))
        tensor([0.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    kept = torch.arange(1, len(losses) + 1, device=losses.device)
    return sorted_by(scores, losses).cumsum(0) / kept


def sorted_by(scores: Tensor, values: Tensor) -> Tensor:
    """Sort values by their scores. Values of equal scores are replaced by their mean.

    Args:
        scores: The score of each value [N].
        values: The values [N].

    Returns:
        The values in the order of increasing scores, in float64 [N].

    Examples:
        >>> sorted_by(torch.tensor([0.3, 0.1, 0.3]), torch.tensor([1.0, 2.0, 4.0]))
        tensor([2.0000, 2.5000, 2.5000], dtype=torch.float64)
    """
    _, ranks, counts = scores.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64, device=values.device)
    means = sums.index_add_(0, ranks, values.double()) / counts
    return means.repeat_interleave(counts)


def _half_widths(levels: Sequence[float], like: Tensor) -> Tensor:
    """Compute the half width of the central interval of N(0, 1) at each level [L], in float64."""
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels={list(levels)}: a central interval needs a level in (0, 1)")
    nominal = torch.tensor(levels, dtype=torch.float64, device=like.device)
    half_widths: Tensor = torch.special.ndtri((1 + nominal) / 2)
    return half_widths


def _require_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}: calibration needs at least one bin")
