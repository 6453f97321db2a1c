"""Uncertainty metrics that torchmetrics lacks, as plain functions of tensors.

Draws lie on the leading axis, rows follow: [S, N, ...]. Scores are returned per row, so that
the caller can average them, count them, or look at the worst. Entropies are in nats.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CalibrationBins(NamedTuple):
    """What a reliability diagram shows, one entry per bin [B]; an empty bin is all zeros."""

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


class Moments(NamedTuple):
    """Mean and variance of a mixture of Gaussians, the variance in its two parts; each [N]."""

    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor

    @property
    def variance(self) -> Tensor:
        """Law of total variance: E_s[var_s] + Var_s[mean_s]."""
        return self.aleatoric + self.epistemic


def log_mean_exp(values: Tensor) -> Tensor:
    """log (1/S) sum_s exp(values_s) over the leading axis, without overflow."""
    return values.logsumexp(0) - math.log(len(values))


def entropy(probabilities: Tensor) -> Tensor:
    """H[p] = -sum_c p_c log p_c over the last axis, with 0 log 0 = 0."""
    terms: Tensor = torch.special.entr(probabilities)
    return terms.sum(-1)


def mutual_information(mean: Tensor, mean_entropy: Tensor) -> Tensor:
    """Disagreement between draws, in nats: [N], never negative, 0 for one draw.

    I[y; w] = H[E_s p_s] - E_s H[p_s], the epistemic part of the predictive entropy
    (Depeweg et al. 2018), from the mean [N, C] of the draws' probabilities and the mean [N] of
    their entropies. Rounding below zero is clipped.
    """
    return (entropy(mean) - mean_entropy).clamp_min(0)


def brier_score(probabilities: Tensor, targets: Tensor) -> Tensor:
    """sum_c (p_c - [y = c])^2 of probabilities [N, C] and classes [N]: [N], from 0 to 2."""
    one_hot = torch.nn.functional.one_hot(targets, probabilities.shape[-1])
    return (probabilities - one_hot).square().sum(-1)


def calibration_bins(confidences: Tensor, correct: Tensor, num_bins: int) -> CalibrationBins:
    """Count, mean confidence and accuracy of the equal-width bins ((b-1)/B, b/B].

    A confidence of exactly 1.0 lies in the last bin, one of exactly 0.0 in the first.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}: calibration needs at least one bin")
    confidences = confidences.double()
    inner_edges = torch.linspace(
        0, 1, num_bins + 1, dtype=confidences.dtype, device=confidences.device
    )[1:-1]
    bins = torch.bucketize(confidences, inner_edges)
    # index_add_ and not bincount, whose weights have no deterministic CUDA kernel
    rows = torch.stack([torch.ones_like(confidences), confidences, correct.double()], -1)
    counts, confidence, accuracy = rows.new_zeros(num_bins, 3).index_add_(0, bins, rows).unbind(-1)
    divisor = counts.clamp_min(1)
    return CalibrationBins(counts.long(), confidence / divisor, accuracy / divisor)


def expected_calibration_error(confidences: Tensor, correct: Tensor, num_bins: int) -> Tensor:
    """ECE = sum_b n_b / N |accuracy_b - confidence_b|, a scalar from 0 to 1 (Guo et al. 2017)."""
    counts, confidence, accuracy = calibration_bins(confidences, correct, num_bins)
    return (counts * (accuracy - confidence).abs()).sum() / len(confidences)


def moments(means: Tensor, log_variances: Tensor) -> Moments:
    """Match one Gaussian to the equal-weight mixture of S: draws [S, N] to moments [N].

    The variance of the means is the population's (divided by S), so it is 0 for S = 1.
    """
    return Moments(
        mean=means.mean(0),
        aleatoric=log_variances.exp().mean(0),
        epistemic=means.var(0, correction=0),
    )


def gaussian_nll(mean: Tensor, log_variance: Tensor, targets: Tensor) -> Tensor:
    """-log N(y; mean, variance), elementwise, in nats, the constant 0.5 log 2 pi included."""
    squared_z = (targets - mean).square() * torch.exp(-log_variance)
    return 0.5 * (math.log(2 * math.pi) + log_variance + squared_z)


def gaussian_mixture_nll(means: Tensor, log_variances: Tensor, targets: Tensor) -> Tensor:
    """-log (1/S) sum_s N(y; mean_s, variance_s) of draws [S, N] at targets [N]: [N], in nats."""
    return -log_mean_exp(-gaussian_nll(means, log_variances, targets))


def interval_coverage(
    mean: Tensor, std: Tensor, targets: Tensor, levels: Sequence[float]
) -> Tensor:
    """Share of targets inside the central interval of N(mean, std^2), for each level: [L].

    The interval of level q is mean +- Phi^-1((1 + q) / 2) std; calibrated predictions cover q.
    """
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels={list(levels)}: a central interval needs a level in (0, 1)")
    nominal = torch.tensor(levels, dtype=torch.float64, device=targets.device)
    half_widths: Tensor = torch.special.ndtri((1 + nominal) / 2)
    inside = (targets - mean).abs() <= half_widths[:, None] * std
    return inside.double().mean(-1)


def risk_coverage(scores: Tensor, losses: Tensor) -> Tensor:
    """Mean loss of the 1, 2, ..., N rows with the lowest scores [N]: [N], in float64.

    Rows of equal score come in no particular order: the curve is its expectation over all of
    them. Its mean is the area under it (AURC, Geifman & El-Yaniv 2017).
    """
    _, ranks, counts = scores.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64, device=losses.device)
    means = sums.index_add_(0, ranks, losses.double()) / counts
    kept = torch.arange(1, len(losses) + 1, device=losses.device)
    return means.repeat_interleave(counts).cumsum(0) / kept
