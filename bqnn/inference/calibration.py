"""Calibration of a trained model: temperature and vector scaling, and a factor on deviations.

A calibration changes draws of a network's output, so metrics and summaries take its result like
any other draws. Its numbers are fitted on rows that the network was not trained on.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from bqnn.inference.likelihoods import Classification, Likelihood, Regression
from bqnn.inference.mixtures import CategoricalMixture, GaussianMixture
from bqnn.text import short

log = logging.getLogger(__name__)

LARGEST_LOG_SCALE = 3.0  # factors are searched from 0.05 to 20
LARGEST_BIAS = 10.0
FEW_ERRORS = 10  # wrong predictions, of which a temperature needs some
FEW_ROWS = 10  # of which the factor of a regression needs some


@dataclass(frozen=True)
class Calibration(ABC):
    """Base class of calibrations, which change draws of a network's output."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, draws: Tensor) -> Tensor:
        """Calibrate draws [S, N, num_outputs]; the result has their dtype and device."""

    def by_count(self, draws: Tensor, num_samples: Tensor) -> Tensor:
        """Calibrate draws of rows that made different numbers of them.

        Args:
            draws: Draws [S, N, num_outputs], NaN where a row made none.
            num_samples: The number of draws of each row [N].
        """
        calibrated = draws.clone()
        for count in num_samples.unique().tolist():
            is_row = num_samples == count
            calibrated[:count, is_row] = self(draws[:count])[:, is_row]
        return calibrated

    @abstractmethod
    def fits(self, likelihood: Likelihood) -> bool:
        """Return whether draws of this likelihood can be calibrated."""

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the numbers, in JSON types; `calibration_from` reads them."""
        values: dict[str, Any] = {"name": self.name}
        for field in fields(self):
            value = getattr(self, field.name)
            values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    def numbers(self) -> dict[str, float]:
        """Return the numbers that are not one per class."""
        return {n: value for n, value in self.to_dict().items() if isinstance(value, float)}


@dataclass(frozen=True)
class TemperatureScaling(Calibration):
    """Divide the logits of every draw by a temperature (Guo et al. 2017).

    Args:
        temperature: Above 1, probabilities move towards equality; the predicted class of one draw
            stays the same.

    Examples:
        >>> TemperatureScaling(2.0)(torch.tensor([[[4.0, 0.0]]]))
        tensor([[[2., 0.]]])
    """

    temperature: float
    name: ClassVar[str] = "temperature"

    def __call__(self, draws: Tensor) -> Tensor:
        return draws / self.temperature

    def fits(self, likelihood: Likelihood) -> bool:
        return isinstance(likelihood, Classification)


@dataclass(frozen=True)
class VectorScaling(Calibration):
    """Multiply the logits of each class by a factor, and add a bias (Guo et al. 2017).

    Args:
        scale: The factor of each class.
        bias: The bias of each class.

    Examples:
        >>> VectorScaling(scale=(2.0, 1.0), bias=(0.0, 1.0))(torch.tensor([[[4.0, 0.0]]]))
        tensor([[[8., 1.]]])
    """

    scale: tuple[float, ...]
    bias: tuple[float, ...]
    name: ClassVar[str] = "vector"

    def __call__(self, draws: Tensor) -> Tensor:
        return draws * draws.new_tensor(self.scale) + draws.new_tensor(self.bias)

    def fits(self, likelihood: Likelihood) -> bool:
        num_classes = likelihood.num_outputs
        is_complete = len(self.scale) == len(self.bias) == num_classes
        return isinstance(likelihood, Classification) and is_complete


@dataclass(frozen=True)
class DeviationScaling(Calibration):
    """Multiply the predicted standard deviation, and both of its parts, by a factor.

    The means of the draws move away from their mean, or towards it, and the logarithms of their
    variances change by 2 log(factor).

    Args:
        factor: The factor.

    Examples:
        >>> DeviationScaling(2.0)(torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]]))
        tensor([[[0.0000, 1.3863]],
        <BLANKLINE>
                [[4.0000, 1.3863]]])
    """

    factor: float
    name: ClassVar[str] = "deviation"

    def __call__(self, draws: Tensor) -> Tensor:
        means, log_variances = draws.unbind(-1)
        mean = means.mean(0)
        means = mean + self.factor * (means - mean)
        return torch.stack([means, log_variances + 2 * math.log(self.factor)], -1)

    def fits(self, likelihood: Likelihood) -> bool:
        return isinstance(likelihood, Regression)


CALIBRATIONS: Mapping[str, type[Calibration]] = {
    kind.name: kind for kind in (TemperatureScaling, VectorScaling, DeviationScaling)
}


def fit_calibration(
    name: str, likelihood: Likelihood, draws: Tensor, targets: Tensor
) -> Calibration:
    """Fit a calibration that minimizes the NLL of the mixture of the draws.

    Args:
        name: `temperature` or `vector`. For a regression, `temperature` is a factor on the standard
            deviation: the square root of the mean of (y - mean)^2 / std^2, which minimizes the NLL
            of the Gaussian with the mixture's moments.
        likelihood: The likelihood of the network's outputs.
        draws: Draws of the output [S, N, num_outputs] for rows that the network was not trained on.
        targets: Their targets [N].

    Returns:
        The calibration. Factors are from 0.05 to 20. Warnings tell of a factor at a bound, of fewer
        than ten wrong predictions, which determine a temperature poorly, and of fewer than ten rows
        of a regression.

    Raises:
        ValueError: The name is unknown, or a regression has no such calibration.

    Examples:
        >>> likelihood = Classification(["cat", "dog"])
        >>> logits = torch.tensor([8.0, 0.0]).expand(1, 4, 2)  # sure, and right 3 times of 4
        >>> fitted = fit_calibration("temperature", likelihood, logits, torch.tensor([0, 0, 0, 1]))
        >>> fitted(logits)[0, 0].softmax(-1)
        tensor([0.7500, 0.2500])
    """
    check_calibration(name, likelihood)
    if isinstance(likelihood, Regression):
        _warn_of_few_rows(len(targets))
        mixture = GaussianMixture.of(draws, targets)
        squared_z = (targets.double() - mixture.mean).square() / mixture.variance
        log_factor = squared_z.mean().clamp_min(1e-30).log().item() / 2
        bounded = min(max(log_factor, -LARGEST_LOG_SCALE), LARGEST_LOG_SCALE)
        _warn_at_bound([bounded])
        return DeviationScaling(math.exp(bounded))
    _warn_of_few_errors(likelihood.summary(draws)["probabilities"], targets)
    num_scales = likelihood.num_outputs if name == "vector" else 1
    log_scale, bias = _fit_logits(draws.double(), targets, num_scales, has_bias=name == "vector")
    _warn_at_bound(log_scale)
    if name == "vector":
        return VectorScaling(tuple(map(math.exp, log_scale)), tuple(bias))
    return TemperatureScaling(math.exp(-log_scale[0]))


def check_calibration(name: str, likelihood: Likelihood) -> None:
    """Refuse a calibration that does not exist, or not for this likelihood.

    Raises:
        ValueError: The name is unknown, or a regression has no such calibration.
    """
    if name not in ("temperature", "vector"):
        raise ValueError(f"calibrate={short(name)}: choose temperature or vector")
    if name == "vector" and not isinstance(likelihood, Classification):
        raise ValueError(
            "calibrate=vector: a regression has no classes to scale; choose temperature, which "
            "multiplies its standard deviation by a factor"
        )


def calibration_from(values: Mapping[str, Any], likelihood: Likelihood) -> Calibration:
    """Build a calibration from the result of `Calibration.to_dict`.

    Args:
        values: The name and the numbers, whose types and ranges are checked already.
        likelihood: The likelihood of the draws.

    Raises:
        ValueError: The calibration does not exist, or not for this likelihood.

    Examples:
        >>> likelihood = Classification(["cat", "dog"])
        >>> calibration_from({"name": "temperature", "temperature": 1.5}, likelihood)
        TemperatureScaling(temperature=1.5)
    """
    kind = CALIBRATIONS.get(values["name"])
    numbers = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items() if n != "name"}
    if kind is None or numbers.keys() != {field.name for field in fields(kind)}:
        raise ValueError(
            f"calibration={short(values['name'])} with {', '.join(numbers) or 'no numbers'}: "
            f"expected one of {', '.join(CALIBRATIONS)} with its own numbers"
        )
    calibration = kind(**numbers)
    if not calibration.fits(likelihood):
        raise ValueError(
            f"calibration={short(values['name'])}: it is not for a "
            f"{type(likelihood).__name__.lower()} of {likelihood.num_outputs} outputs"
        )
    return calibration


def _fit_logits(
    logits: Tensor, targets: Tensor, num_scales: int, has_bias: bool
) -> tuple[list[float], list[float]]:
    """Return the logarithms of factors, and biases, with the least NLL of the scaled logits."""
    import numpy as np
    from scipy.optimize import minimize

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            scaled = logits * point[:num_scales].exp()
            if has_bias:
                scaled = scaled + point[num_scales:]
            log_likelihood = CategoricalMixture.of(scaled, targets).log_likelihood
            assert log_likelihood is not None
            nll = -log_likelihood.mean()
        (gradient,) = torch.autograd.grad(nll, point)
        return nll.item(), gradient.numpy()

    bounds = [(-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE)] * num_scales
    if has_bias:
        bounds += [(-LARGEST_BIAS, LARGEST_BIAS)] * num_scales
    start = np.zeros(len(bounds))
    options = {"ftol": 1e-12, "gtol": 1e-8}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return found[:num_scales].tolist(), found[num_scales:].tolist()


def _warn_of_few_errors(probabilities: Tensor, targets: Tensor) -> None:
    num_errors = int((probabilities.argmax(-1) != targets).sum())
    if num_errors < FEW_ERRORS:
        log.warning(
            "calibration: only %d of %d validation rows are predicted wrong, so it may overfit "
            "them; compare the nll of the test set, or train with more validation rows",
            num_errors,
            len(targets),
        )


def _warn_of_few_rows(count: int) -> None:
    if count < FEW_ROWS:
        log.warning(
            "calibration: fitted on %d validation rows, so the factor may be far off; train with "
            "more validation rows",
            count,
        )


def _warn_at_bound(log_scales: list[float]) -> None:
    if max(map(abs, log_scales)) >= LARGEST_LOG_SCALE:
        log.warning(
            "calibration: a factor is at the end of its range (0.05 to 20), as if all validation "
            "rows were predicted right, or none; there may be too few of them"
        )
