"""Convergence of Markov chains, after Vehtari et al. (2021): R-hat and effective sample size."""

import math

import torch
from torch import Tensor

FEWEST = 4  # draws of a chain


def split_rhat(draws: Tensor) -> float:
    """Compute the rank-normalized split R-hat of a quantity.

    With W the mean variance within the halves of the chains, B the variance between their means,
    and N draws in a half, R-hat is sqrt((N - 1) / N + B / W). It is computed for the normal scores
    of the draws, and of their distances from the median; the result is the larger one. Below 1.01,
    the chains agree.

    Args:
        draws: A value for each draw of each chain [M, N], with N of at least 4.

    Returns:
        R-hat; NaN if all draws are equal.

    Raises:
        ValueError: There are fewer draws.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> round(split_rhat(torch.randn(4, 1000)), 2)
        1.0
        >>> split_rhat(torch.randn(4, 1000) + torch.arange(4)[:, None]) > 1.5
        True
    """
    halves = _halves(draws)
    distances = (halves - halves.quantile(0.5)).abs()
    found = [_rhat(_normal_scores(values)) for values in (halves, distances)]
    return max((rhat for rhat in found if math.isfinite(rhat)), default=math.nan)


def effective_sample_size(draws: Tensor) -> float:
    """Compute the bulk effective sample size of a quantity.

    It is M N / tau, where tau is 1 + 2 times the sum of the autocorrelations of the normal scores
    of the draws, up to the lag at which Geyer's initial positive sequence ends.

    Args:
        draws: A value for each draw of each chain [M, N], with N of at least 4.

    Returns:
        The number of independent draws with the same information about the mean; NaN if all draws
        are equal.

    Raises:
        ValueError: There are fewer draws.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> 3000 < effective_sample_size(torch.randn(4, 1000)) < 5000
        True
    """
    scores = _normal_scores(_halves(draws))
    num_chains, num_draws = scores.shape
    within, total = _variances(scores)
    if total == 0:
        return math.nan
    rho = 1 - (within - _autocovariance(scores).mean(0)) / total  # [N]
    rho[0] = 1
    # The last lags, of few draws, are left out as in the R package `posterior` and in ArviZ.
    pairs = rho[: 2 * max((num_draws - 3) // 2, 1)].reshape(-1, 2).sum(1)
    count = int((pairs > 0).cumprod(0).sum())
    tau = float(2 * pairs[:count].cummin(0).values.sum()) - 1
    if 2 * count < num_draws:
        tau += max(float(rho[2 * count]), 0)
    size = num_chains * num_draws
    return size / max(tau, 1 / math.log10(size))


def _halves(draws: Tensor) -> Tensor:
    """Split each chain in two, without its middle draw if N is odd: [2 M, N // 2] in float64."""
    if draws.dim() != 2 or draws.shape[1] < FEWEST:
        raise ValueError(
            f"draws: they have the shape {tuple(draws.shape)}; pass [M, N], with at least "
            f"{FEWEST} draws in each of M chains"
        )
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]]).double()


def _normal_scores(draws: Tensor) -> Tensor:
    """Replace each draw by the normal quantile of its rank; equal draws share their mean rank."""
    _, place, counts = draws.unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2
    return torch.special.ndtri((ranks[place].double() - 3 / 8) / (draws.numel() + 1 / 4))


def _variances(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variance within chains, and the estimate of the total variance."""
    num_draws = draws.shape[1]
    within = draws.var(1).mean()
    return within, within * (num_draws - 1) / num_draws + draws.mean(1).var()


def _rhat(draws: Tensor) -> float:
    within, total = _variances(draws)
    return float((total / within).sqrt())


def _autocovariance(draws: Tensor) -> Tensor:
    """Return the autocovariance of each chain at the lags 0 to N - 1, divided by N: [M, N]."""
    num_draws = draws.shape[1]
    spectrum = torch.fft.rfft(draws - draws.mean(1, keepdim=True), 2 * num_draws)
    return torch.fft.irfft(spectrum.abs().square(), 2 * num_draws)[:, :num_draws] / num_draws
