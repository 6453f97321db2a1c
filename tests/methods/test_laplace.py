"""Laplace is exact where the posterior is Gaussian, and keeps the network that it is given."""

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from bqnn.inference.likelihoods import Regression
from bqnn.layers.bayes import held_means
from bqnn.methods import Laplace
from bqnn.methods.laplace import PRIOR_STDS, log_evidence
from bqnn.nets import ResNet
from tests.bare_trainer import bare_trainer
from tests.small_methods import ADAM, NUM_ROWS, image_method, images, table, table_method

NOISE_STD = 0.5


class LinearRegression(nn.Module):
    """y = w x + noise with known variance."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.linear(x)
        return torch.cat([mean, torch.full_like(mean, 2 * math.log(NOISE_STD))], 1)


def linear(num_train: int, **options: Any) -> Laplace:
    options = {"num_train": num_train, "seed": 0, "optimizer": ADAM, **options}
    return Laplace(LinearRegression(3), Regression(0.0, 1.0), **options)


def laplace_of(method: object) -> Laplace:
    assert isinstance(method, Laplace)
    return method


def test_a_linear_regression_has_the_precisions_of_its_exact_posterior() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20)
    method = linear(20, prior=0.7)
    method.set_posterior([(x[:8], y[:8]), (x[8:], y[8:])], validation=[])
    exact = x.t() @ x / NOISE_STD**2 + torch.eye(3) / 0.7**2
    (layer,) = method.gaussian_weights().values()
    torch.testing.assert_close(layer.sigma[0], exact.diag().rsqrt())


def test_the_evidence_of_a_linear_regression_is_exact() -> None:
    """With orthogonal inputs, the posterior is independent between weights."""
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(20, 3, dtype=torch.float64))[0] * torch.tensor([1.0, 2.0, 3.0])
    y = torch.randn(20, dtype=torch.float64)
    method = linear(20, prior=1.0)
    (layer,) = method.gaussian_weights().values()
    for prior_std in (0.1, 1.0, 5.0):
        precision = x.t() @ x / NOISE_STD**2 + torch.eye(3) / prior_std**2
        with torch.no_grad():
            layer.mean.copy_(torch.linalg.solve(precision, x.t() @ y / NOISE_STD**2)[None])
        fisher = method.fisher([(x.float(), y.float())])
        fit = torch.distributions.Normal(x @ layer.mean.detach()[0].double(), NOISE_STD).log_prob(y)
        covariance = NOISE_STD**2 * torch.eye(20) + prior_std**2 * x @ x.t()
        exact = MultivariateNormal(torch.zeros(20).double(), covariance).log_prob(y)
        found = float(fit.sum()) + log_evidence(fisher, prior_std)
        assert found == pytest.approx(float(exact), rel=1e-5)


def test_rows_that_are_left_out_count_as_the_others() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(10, 3), torch.randn(10)
    method = linear(20)
    (part,) = method.fisher([(x, y)]).values()
    (whole,) = method.fisher([(x, y), (x, y)]).values()
    torch.testing.assert_close(part, whole)


def test_the_prior_is_the_best_of_the_grid() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(4, 3), torch.tensor([1.0, -1.0, 1.0])
    method = linear(4)
    (layer,) = method.gaussian_weights().values()
    with torch.no_grad():
        layer.mean.copy_(weights[None])
    fisher = method.fisher([(x, x @ weights)])
    grid = {std: log_evidence(fisher, std) for std in PRIOR_STDS}
    best = method.best_prior_std("marginal_likelihood", fisher, [])
    assert grid[best] == max(grid.values())
    assert 0.3 < best < 3  # the weights are of magnitude 1
    # Rows that the means predict want a certain network, and others a doubtful one.
    method.eval()
    certain = method.best_prior_std("validation", fisher, [(x, x @ weights)])
    doubtful = method.best_prior_std("validation", fisher, [(x, x @ weights + 3)])
    assert certain <= 0.1 < doubtful


def test_rows_without_a_finite_nll_are_no_choice() -> None:
    method = linear(4).eval()
    fisher = method.fisher([(torch.randn(4, 3), torch.randn(4))])
    far = [(torch.randn(4, 3), torch.full((4,), torch.inf))]
    with pytest.raises(ValueError, match=r"^laplace: no prior leads to a finite NLL"):
        method.best_prior_std("validation", fisher, far)


def test_without_validation_rows_there_is_no_choice_by_them() -> None:
    fit = bare_trainer(1, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=r"^prior=validation: there are no validation rows"):
        fit.fit(table_method("laplace", prior="validation"), table())
    with pytest.raises(ValueError, match=r"^prior='evidence': choose validation or marginal_lik"):
        table_method("laplace", prior="evidence")
    with pytest.raises(ValueError, match=r"^prior=0: a standard deviation must be positive"):
        table_method("laplace", prior=0)


def test_the_choice_is_logged_and_needs_no_validation_in_the_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    method = table_method("laplace", prior="validation")
    fit = bare_trainer(2, num_sanity_val_steps=0, inference_mode=False, check_val_every_n_epoch=5)
    with caplog.at_level(logging.INFO, "bqnn.methods.laplace"):
        fit.fit(method, table(), table())
    assert "is chosen by validation" in caplog.text


def test_the_network_is_trained_as_a_pointwise_one() -> None:
    trained = {}
    for name in ("pointwise", "laplace"):
        method = image_method(name)
        bare_trainer(3, num_sanity_val_steps=0, inference_mode=False).fit(method, images())
        if isinstance(method, Laplace):
            with held_means(method.net):
                trained[name] = method.eval()(images().inputs)
        else:
            trained[name] = method.eval()(images().inputs)
    assert torch.equal(trained["pointwise"], trained["laplace"])


def test_a_given_network_is_not_trained() -> None:
    torch.manual_seed(0)
    nets = [ResNet([1, 8, 8], [3], width=2, blocks_per_stage=[1]) for _ in range(2)]
    given, method = image_method("pointwise", nets[0]), image_method("laplace", nets[1])
    bare_trainer(2, num_sanity_val_steps=0, inference_mode=False).fit(given, images())
    laplace_of(method).initialize_from(given.state_dict())
    fit = bare_trainer(1, num_sanity_val_steps=0, inference_mode=False)
    fit.fit(method, images())
    state = method.state_dict()
    for name, value in given.state_dict().items():
        mean = name.replace(".weight", ".mean")
        assert torch.equal(state[mean if mean in state else name], value), name
    rho = torch.cat(
        [layer.rho.flatten() for layer in laplace_of(method).gaussian_weights().values()]
    )
    assert rho.min() > -40
    assert fit.callback_metrics["train/lr"] == 0
    with torch.no_grad(), held_means(method.net):
        nll = method.likelihood.loss(method.eval()(images().inputs), images().targets)
    torch.testing.assert_close(fit.callback_metrics["train/nll"], nll)


def test_a_network_is_its_own_limit_for_many_rows() -> None:
    few, many = (table_method("laplace", num_train=n, prior=1.0) for n in (NUM_ROWS, 10**9))
    for method in (few, many):
        laplace_of(method).set_posterior(table(), [])
    sigma_few, sigma_many = (
        next(iter(laplace_of(m).gaussian_weights().values())).sigma for m in (few, many)
    )
    seen = sigma_few < 0.999  # a weight that the rows determine
    assert seen.any()
    assert (sigma_many[seen] < 1e-2 * sigma_few[seen]).all()
