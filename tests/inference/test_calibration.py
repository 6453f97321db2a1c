"""Calibrations against known temperatures, closed forms and the identity."""

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bqnn.inference.calibration import (
    Calibration,
    DeviationScaling,
    TemperatureScaling,
    VectorScaling,
    calibration_from,
    fit_calibration,
)
from bqnn.inference.likelihoods import Classification, Likelihood, Regression
from bqnn.inference.predictions import Prediction, score

LETTERS = Classification("abc")
HOUSES = Regression(target_mean=20.0, target_std=3.0)


def labelled(num_rows: int = 40_000) -> tuple[Tensor, Tensor]:
    """Logits [1, N, 3], and labels drawn from their softmax."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num_rows, 3, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return logits[None], targets


def measured(num_samples: int = 4, num_rows: int = 500) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(num_samples, num_rows, 2, generator=generator)
    return draws, 3 * torch.randn(num_rows, generator=generator)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_known_temperature_is_found(temperature: float) -> None:
    logits, targets = labelled()
    fitted = fit_calibration("temperature", LETTERS, temperature * logits, targets)
    assert isinstance(fitted, TemperatureScaling)
    assert fitted.temperature == pytest.approx(temperature, rel=0.03)


def test_known_factors_and_biases_are_found() -> None:
    logits, targets = labelled()
    bias = torch.tensor([0.5, -1.0, 0.5], dtype=torch.float64)
    scale = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    fitted = fit_calibration("vector", LETTERS, (logits - bias) / scale, targets)
    assert isinstance(fitted, VectorScaling)
    assert fitted.scale == pytest.approx(scale.tolist(), rel=0.05)
    found = torch.tensor(fitted.bias) - sum(fitted.bias) / 3  # a common bias has no effect
    assert found.tolist() == pytest.approx(bias.tolist(), abs=0.1)


@pytest.mark.parametrize("name", ["temperature", "vector"])
def test_draws_are_scaled_before_they_are_mixed_and_the_nll_is_least(name: str) -> None:
    logits, targets = labelled(2000)
    noise = torch.randn(5, 2000, 3, generator=torch.Generator().manual_seed(1))
    raw = Prediction(LETTERS, (3 * logits + noise).float(), targets)
    fitted = fit_calibration(name, LETTERS, raw.samples, targets)
    least = score(raw.calibrated(fitted))["nll"]
    assert least < score(raw)["nll"]
    for step in (-0.05, 0.05):
        values = fitted.to_dict()
        key = "temperature" if name == "temperature" else "scale"
        changed = torch.as_tensor(values[key]) * (1 + step)
        near = calibration_from({**values, key: changed.tolist()}, LETTERS)
        assert score(raw.calibrated(near))["nll"] > least


def test_the_factor_of_a_regression_is_its_closed_form() -> None:
    draws, targets = measured()
    raw = Prediction(HOUSES, draws, targets)
    fitted = fit_calibration("temperature", HOUSES, draws, targets)
    summary = raw.summary
    z = (20 + 3 * targets.double() - summary["mean"]) / summary["std"]
    assert isinstance(fitted, DeviationScaling)
    assert fitted.factor == pytest.approx(z.square().mean().sqrt().item(), rel=1e-9)
    calibrated = raw.calibrated(fitted)
    for name in ("std", "aleatoric_std", "epistemic_std"):
        torch.testing.assert_close(
            calibrated.summary[name], fitted.factor * summary[name], rtol=1e-5, atol=0
        )
    torch.testing.assert_close(calibrated.summary["mean"], summary["mean"], rtol=1e-6, atol=0)
    least = score(calibrated)["nll"]
    for factor in (0.9 * fitted.factor, 1.1 * fitted.factor):
        assert score(raw.calibrated(DeviationScaling(factor)))["nll"] > least


@pytest.mark.parametrize(
    ("calibration", "likelihood"),
    [
        (TemperatureScaling(1.0), LETTERS),
        (VectorScaling((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)), LETTERS),
        (DeviationScaling(1.0), HOUSES),
    ],
)
def test_calibrations_have_an_identity_and_a_record(
    calibration: Calibration, likelihood: Likelihood
) -> None:
    draws = torch.randn(3, 4, likelihood.num_outputs, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(calibration(draws), draws)
    assert calibration(draws).dtype == torch.float32
    assert calibration_from(calibration.to_dict(), likelihood) == calibration


def test_rows_that_are_all_predicted_right_give_the_bound_and_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    targets = torch.arange(30) % 3
    logits = 0.5 * torch.nn.functional.one_hot(targets).float()[None]
    with caplog.at_level(logging.WARNING):
        fitted = fit_calibration("temperature", LETTERS, logits, targets)
    assert fitted == TemperatureScaling(pytest.approx(math.exp(-3)))
    assert "a factor is at the end of its range" in caplog.text
    assert "only 0 of 30 validation rows are predicted wrong" in caplog.text


def test_enough_errors_need_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit_calibration("temperature", LETTERS, *labelled(200))
    assert caplog.text == ""


@pytest.mark.parametrize(("count", "is_few"), [(9, True), (10, False)])
def test_few_rows_of_a_regression_are_said(
    count: int, is_few: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        fit_calibration("temperature", HOUSES, torch.zeros(2, count, 2), torch.ones(count))
    assert ("fitted on 9 validation rows" in caplog.text) == is_few


@pytest.mark.parametrize(
    ("values", "likelihood"),
    [
        ({"name": "isotonic"}, LETTERS),
        ({"name": "temperature"}, LETTERS),
        ({"name": "temperature", "factor": 2.0}, LETTERS),
        ({"name": "temperature", "temperature": 2.0, "factor": 2.0}, LETTERS),
        ({"name": "temperature", "temperature": 2.0}, HOUSES),
        ({"name": "vector", "scale": [1.0, 2.0], "bias": [0.0, 0.0]}, LETTERS),
        ({"name": "vector", "scale": [1.0] * 3, "bias": [0.0]}, LETTERS),
        ({"name": "deviation", "factor": 2.0}, LETTERS),
    ],
)
def test_a_record_of_another_kind_is_refused(
    values: dict[str, Any], likelihood: Likelihood
) -> None:
    with pytest.raises(ValueError, match=r"^calibration='"):
        calibration_from(values, likelihood)


def test_calibrations_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="calibrate='isotonic': choose temperature or vector"):
        fit_calibration("isotonic", LETTERS, *labelled(10))
    with pytest.raises(ValueError, match="a regression has no classes"):
        fit_calibration("vector", HOUSES, *measured())
