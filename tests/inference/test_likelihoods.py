"""Losses and metrics of both likelihoods against scipy, scikit-learn and hand cases."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from torch import Tensor

from bqnn.inference.likelihoods import Classification, Likelihood, Regression, likelihood_from
from bqnn.inference.predictions import Prediction, score, score_uncertainty

DIGITS = Classification([str(digit) for digit in range(10)])
HOUSES = Regression(target_mean=22.5, target_std=9.2)


def classified(num_samples: int = 6, num_rows: int = 200) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num_samples, num_rows, 10, generator=generator)
    return logits, torch.randint(10, (num_rows,), generator=generator)


def regressed(num_samples: int = 6, num_rows: int = 200) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(num_samples, num_rows, 2, generator=generator)
    return samples, torch.randn(num_rows, generator=generator)


def metrics_of(likelihood: Likelihood, samples: Tensor, targets: Tensor) -> dict[str, float]:
    return score(Prediction(likelihood, samples, targets))


def uncertainty_of(likelihood: Likelihood, samples: Tensor) -> dict[str, float]:
    return score_uncertainty(Prediction(likelihood, samples))


BOTH = pytest.mark.parametrize(
    ("likelihood", "samples", "targets"), [(DIGITS, *classified()), (HOUSES, *regressed())]
)


def test_classification_loss_is_the_mean_negative_log_softmax():
    logits, targets = classified()
    expected = -scipy.special.log_softmax(logits[0].numpy(), axis=-1)[range(200), targets].mean()
    assert DIGITS.loss(logits[0], targets).item() == pytest.approx(expected, rel=1e-6)


def test_regression_loss_is_the_full_gaussian_nll_in_standardized_units():
    samples, targets = regressed()
    mean, log_variance = samples[0].double().unbind(-1)
    expected = -scipy.stats.norm.logpdf(targets, mean, np.exp(0.5 * log_variance.numpy())).mean()
    assert HOUSES.loss(samples[0], targets).item() == pytest.approx(expected, rel=1e-6)


@BOTH
def test_loss_is_float32_under_bfloat16_and_carries_gradients(likelihood, samples, targets):
    output = samples[0].bfloat16().requires_grad_()
    loss = likelihood.loss(output, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert output.grad is not None
    assert output.grad.isfinite().all()
    assert loss.item() == pytest.approx(likelihood.loss(samples[0], targets).item(), rel=0.02)


@pytest.mark.parametrize("likelihood", [Classification(["a", "b", "c"]), Regression(5.0, 2.0)])
def test_the_expected_loss_is_the_mean_over_targets_that_the_other_output_predicts(
    likelihood: Likelihood,
) -> None:
    torch.manual_seed(0)
    output, other = torch.randn(2, 4, likelihood.num_outputs).unbind()
    if isinstance(likelihood, Classification):
        targets = torch.distributions.Categorical(logits=other).sample((20_000,))
    else:
        targets = torch.distributions.Normal(other[:, 0], (other[:, 1] / 2).exp()).sample((20_000,))
    losses = torch.stack([likelihood.loss(output, each) for each in targets])
    expected = likelihood.expected_loss(output, other)
    assert abs(float(losses.mean() - expected)) < 4 * float(losses.std()) / 20_000**0.5


@pytest.mark.parametrize("likelihood", [Classification(["a", "b", "c"]), Regression(5.0, 2.0)])
def test_the_expected_loss_is_least_where_outputs_agree(likelihood: Likelihood) -> None:
    torch.manual_seed(0)
    output = torch.randn(4, likelihood.num_outputs, requires_grad=True)
    loss = likelihood.expected_loss(output, output.detach())
    assert torch.autograd.grad(loss, output)[0].abs().max() < 1e-6


def test_classification_metrics_are_those_of_the_mean_probability():
    samples, targets = classified()
    metrics = metrics_of(DIGITS, samples, targets)
    draws = scipy.special.softmax(samples.double().numpy(), axis=-1)
    mean = draws.mean(0)
    labels = list(range(10))
    wrong = 1 - sklearn.metrics.accuracy_score(targets, mean.argmax(-1))
    one_hot = np.eye(10)[targets]
    predictive_entropy = scipy.stats.entropy(mean, axis=-1)
    expected_entropy = scipy.stats.entropy(draws, axis=-1).mean(0)
    assert metrics["error"] == pytest.approx(wrong)
    assert metrics["nll"] == pytest.approx(sklearn.metrics.log_loss(targets, mean, labels=labels))
    assert metrics["brier"] == pytest.approx(((mean - one_hot) ** 2).sum(-1).mean())
    assert metrics["ape"] == pytest.approx(predictive_entropy.mean())
    assert metrics["mi"] == pytest.approx((predictive_entropy - expected_entropy).mean())


def test_calibration_errors_of_a_hand_case():
    # Confidence softmax(log 0.8, log 0.2) = 0.8; three of four rows right: |0.75 - 0.8| = 0.05.
    logits = torch.tensor([0.8, 0.2]).log().expand(1, 4, 2)
    metrics = metrics_of(Classification(["cat", "dog"]), logits, torch.tensor([0, 0, 0, 1]))
    assert metrics["error"] == 0.25
    assert metrics["ece"] == pytest.approx(0.05)
    assert metrics["ece10"] == pytest.approx(0.05)


def test_a_certain_mistake_costs_its_logit_and_not_infinity():
    logits = torch.tensor([[[5000.0, 0.0]]])
    metrics = metrics_of(Classification(["cat", "dog"]), logits, torch.tensor([1]))
    assert metrics["nll"] == 5000
    assert (metrics["error"], metrics["brier"], metrics["ape"], metrics["ece"]) == (1, 2, 0, 1)


def test_two_certain_draws_that_disagree_have_log_two_mutual_information():
    logits = torch.tensor([[[5000.0, 0.0]], [[0.0, 5000.0]]])
    metrics = metrics_of(Classification(["cat", "dog"]), logits, torch.tensor([0]))
    assert metrics["mi"] == pytest.approx(math.log(2))
    assert metrics["ape"] == pytest.approx(math.log(2))
    assert metrics["nll"] == pytest.approx(math.log(2))


def test_regression_metrics_are_those_of_scipy_in_original_units():
    samples, targets = regressed()
    metrics = metrics_of(HOUSES, samples, targets)
    y = 22.5 + 9.2 * targets.double().numpy()
    means = 22.5 + 9.2 * samples[..., 0].double().numpy()
    stds = 9.2 * np.exp(0.5 * samples[..., 1].double().numpy())
    mean, std = means.mean(0), np.sqrt(means.var(0) + (stds**2).mean(0))
    log_densities = scipy.stats.norm.logpdf(y, means, stds)
    low, high = scipy.stats.norm.interval(0.95, mean, std)
    assert metrics["rmse"] == pytest.approx(np.sqrt(((y - mean) ** 2).mean()))
    assert metrics["nll"] == pytest.approx(-scipy.stats.norm.logpdf(y, mean, std).mean())
    assert metrics["nll_mixture"] == pytest.approx(
        -scipy.special.logsumexp(log_densities, axis=0, b=1 / 6).mean()
    )
    assert metrics["coverage95"] == pytest.approx(((low <= y) & (y <= high)).mean())


def test_original_units_scale_the_rmse_and_shift_the_nll():
    metrics = metrics_of(HOUSES, *regressed())
    assert metrics["rmse"] == pytest.approx(9.2 * metrics["rmse_standardized"])
    assert metrics["nll"] == pytest.approx(metrics["nll_standardized"] + math.log(9.2))
    unit = metrics_of(Regression(target_mean=0, target_std=1), *regressed())
    assert metrics["nll_mixture"] == pytest.approx(unit["nll_mixture"] + math.log(9.2))
    assert metrics["coverage95"] == unit["coverage95"]


def test_one_draw_has_no_epistemic_part():
    samples, targets = classified(num_samples=1)
    assert metrics_of(DIGITS, samples, targets)["mi"] == 0
    loss = DIGITS.loss(samples[0], targets).item()
    assert metrics_of(DIGITS, samples, targets)["nll"] == pytest.approx(loss, rel=1e-6)

    samples, targets = regressed(num_samples=1)
    metrics = metrics_of(HOUSES, samples, targets)
    assert (HOUSES.summary(samples)["epistemic_std"] == 0).all()
    assert metrics["nll"] == pytest.approx(metrics["nll_mixture"])
    loss = HOUSES.loss(samples[0], targets).item()
    assert metrics["nll_standardized"] == pytest.approx(loss, rel=1e-6)


def test_classification_summary_averages_to_the_metrics():
    samples, targets = classified()
    summary, metrics = DIGITS.summary(samples), metrics_of(DIGITS, samples, targets)
    torch.testing.assert_close(summary["probabilities"].sum(-1), torch.ones(200).double())
    assert summary["entropy"].mean().item() == metrics["ape"]
    assert summary["mutual_information"].mean().item() == metrics["mi"]


def test_regression_summary_is_in_original_units():
    # Standardized draws N(1, 1) and N(3, 4): mean 2, epistemic 1, aleatoric 2.5, total 3.5.
    samples = torch.tensor([[[1.0, 0.0]], [[3.0, math.log(4)]]])
    summary = Regression(target_mean=10, target_std=2).summary(samples)
    assert summary["mean"].item() == 14
    assert summary["epistemic_std"].item() == 2
    assert summary["aleatoric_std"].item() == pytest.approx(2 * math.sqrt(2.5))
    assert summary["std"].item() == pytest.approx(2 * math.sqrt(3.5))


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_samples_raise_with_the_number_of_rows(likelihood, samples, targets, value):
    broken = samples.clone()
    broken[2, 5, 1] = broken[3, 5, 0] = broken[4, 7, 1] = value
    with pytest.raises(ValueError, match=r"nll .* 2 of 200 rows"):
        metrics_of(likelihood, broken, targets)
    with pytest.raises(ValueError, match="2 of 200 rows"):
        likelihood.summary(broken)


def test_variance_that_overflows_raises_with_the_name_of_the_metric():
    samples, targets = regressed()
    samples[:, 3, 1] = 1000
    with pytest.raises(ValueError, match=r"^nll: 1 of 200 rows"):
        metrics_of(HOUSES, samples, targets)


@BOTH
def test_shapes_that_would_broadcast_are_refused(likelihood, samples, targets):
    with pytest.raises(ValueError, match="targets of shape"):
        likelihood.loss(samples[0], targets[:, None])
    with pytest.raises(ValueError, match="targets of shape"):
        metrics_of(likelihood, samples, targets[:, None])
    for shapeless in (samples[0], samples[:0], samples[..., :1]):
        with pytest.raises(ValueError, match="samples of shape"):
            metrics_of(likelihood, shapeless, targets)


@pytest.mark.parametrize(
    ("facts", "kind", "num_outputs"),
    [
        ({"likelihood": "classification", "class_names": ["a", "b", "c"]}, Classification, 3),
        ({"likelihood": "regression", "target_mean": 1, "target_std": 2.0}, Regression, 2),
    ],
)
def test_facts_choose_the_likelihood(facts, kind, num_outputs):
    likelihood = likelihood_from(facts | {"num_train": 100})
    assert isinstance(likelihood, kind)
    assert likelihood.num_outputs == num_outputs


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"likelihood": "poisson"},
        {"likelihood": "classification", "class_names": "abc"},
        {"likelihood": "regression", "target_mean": 0.0},
    ],
)
def test_unknown_or_incomplete_facts_are_refused(facts):
    with pytest.raises(ValueError, match="facts="):
        likelihood_from(facts)


def test_likelihoods_validate_themselves():
    with pytest.raises(ValueError, match="target_std=0"):
        Regression(target_mean=0.0, target_std=0.0)
    with pytest.raises(ValueError, match="target_mean=nan"):
        Regression(target_mean=math.nan, target_std=1.0)
    with pytest.raises(ValueError, match="at least two"):
        Classification(["only"])


@BOTH
def test_convergence_is_the_metrics_of_the_first_draws(likelihood, samples, targets):
    steps = likelihood.convergence(samples, targets)
    assert len(steps) == len(samples)
    for count, step in enumerate(steps, 1):
        assert step == pytest.approx(metrics_of(likelihood, samples[:count], targets), abs=1e-12)


@BOTH
def test_the_parts_of_uncertainty_add_up(likelihood, samples, targets):
    found = uncertainty_of(likelihood, samples)
    if likelihood is DIGITS:
        assert found["ape"] == pytest.approx(found["aleatoric"] + found["mi"])
        assert found["ape"] == metrics_of(likelihood, samples, targets)["ape"]
    else:
        parts = found["aleatoric_std"] ** 2 + found["epistemic_std"] ** 2
        assert found["std"] ** 2 == pytest.approx(parts)


def test_uncertainty_of_a_hand_case():
    # Draws N(1, 1) and N(3, 4), standardized: variance of means 1, mean of variances 2.5.
    samples = torch.tensor([[[1.0, 0.0]], [[3.0, math.log(4)]]])
    found = uncertainty_of(Regression(0.0, 2.0), samples)
    assert found["epistemic_std"] == pytest.approx(2)
    assert found["aleatoric_std"] == pytest.approx(2 * math.sqrt(2.5))
    # Two draws sure of different classes: log 2, and all of it is epistemic.
    samples = torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]])
    found = uncertainty_of(Classification("ab"), samples)
    assert found == pytest.approx({"ape": math.log(2), "aleatoric": 0, "mi": math.log(2)})


def test_losses_average_to_error_and_squared_rmse():
    samples, targets = classified()
    error = DIGITS.losses(DIGITS.summary(samples), targets).mean().item()
    assert error == metrics_of(DIGITS, samples, targets)["error"]
    samples, targets = regressed()
    squared = HOUSES.losses(HOUSES.summary(samples), targets).mean().item()
    assert squared == pytest.approx(metrics_of(HOUSES, samples, targets)["rmse"] ** 2)


@BOTH
def test_scores_are_one_per_row_and_higher_where_draws_are_less_sure(likelihood, samples, targets):
    for scores in likelihood.scores(likelihood.summary(samples)).values():
        assert scores.shape == targets.shape
    flat = samples.clone()
    flat[..., -1] = 5.0  # a large variance; or, with the rest at 5 as well, no favourite class
    if likelihood is DIGITS:
        flat[:] = 5.0
    first = next(iter(likelihood.scores(likelihood.summary(samples))))
    doubtful = likelihood.scores(likelihood.summary(flat))[first]
    assert (doubtful >= likelihood.scores(likelihood.summary(samples))[first]).all()
