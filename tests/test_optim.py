"""SGHMC on Gaussians with known moments: adaptation, prior and state."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bqnn.optim import OPTIMIZERS, SGHMC, make_optimizer

NUM_CHAINS = 20_000
# Chains run side by side as entries of one tensor, so a moment is taken over independent draws
# and a variance has a relative standard error of sqrt(2 / NUM_CHAINS) = 1 %; five of them.
VARIANCE_TOLERANCE = 5 * math.sqrt(2 / NUM_CHAINS)
FIXED_PRECISION: dict[str, float] = {"prior_shape": 1e12, "prior_rate": 1e12}  # at 1


def sampler(shape: tuple[int, ...] = (NUM_CHAINS,), **options: Any) -> tuple[Tensor, SGHMC]:
    """Create a tensor of zeros and its sampler: one row, V fixed at 1, the prior drawn once."""
    weights = nn.Parameter(torch.zeros(shape))
    defaults = {"num_train": 1, "num_burn_in_steps": 0, "resample_prior": 0}
    return weights, SGHMC([weights], **{**defaults, **options})


def run(
    weights: Tensor, optimizer: SGHMC, gradient: Callable[[Tensor], Tensor], num_steps: int
) -> dict[str, Any]:
    """Take steps at these gradients of the mean NLL; return the state of the sampler."""
    for _ in range(num_steps):
        weights.grad = gradient(weights.detach())
        optimizer.step()
    return optimizer.state[weights]


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("resample_momentum", [0, 50])
def test_a_correlated_gaussian_is_sampled_with_its_mean_and_covariance(
    temperature, resample_momentum
):
    # U = (theta - m)' P (theta - m) / (2 temperature) + precision / 2 |theta|^2 is a Gaussian.
    torch.manual_seed(0)
    p = torch.tensor([[2.0, 1.2], [1.2, 1.5]])
    m = torch.tensor([[1.0], [-2.0]])
    num_train = 10  # the mean NLL is U / num_train
    weights, optimizer = sampler(
        (2, NUM_CHAINS),
        lr=0.02,
        friction=0.1,
        temperature=temperature,
        num_train=num_train,
        resample_momentum=resample_momentum,
    )
    # it forgets its start in friction / (lr^2 * eigenvalue) < 250 steps
    state = run(weights, optimizer, lambda theta: p @ (theta - m) / num_train, 1500)

    covariance = torch.linalg.inv(p / temperature + state["precision"] * torch.eye(2))
    mean = (covariance @ p @ m / temperature).squeeze(1)
    scale = covariance.diag().sqrt()
    sampled = weights.detach()
    error = 5 / math.sqrt(NUM_CHAINS)
    assert ((sampled.mean(1) - mean) / scale).abs().max() < error
    difference = (torch.cov(sampled) - covariance) / torch.outer(scale, scale)
    assert difference.abs().max() < VARIANCE_TOLERANCE


def test_positions_and_momenta_have_the_exact_variances_of_the_discrete_chain():
    # theta[t+1] = (2 - f - h) theta[t] - (1 - f) theta[t-1] + noise is an AR(2) process, whose
    # stationary variances are textbook formulas; scales of 1 to 100 share one tensor.
    torch.manual_seed(0)
    curvature = torch.tensor([1.0, 10.0, 100.0])[:, None]
    lr, friction = 0.05, 0.2
    weights, optimizer = sampler((3, NUM_CHAINS), lr=lr, friction=friction, resample_momentum=0)
    state = run(weights, optimizer, lambda theta: curvature * theta, 1500)

    f = friction
    h = lr**2 * (curvature.squeeze(1) + state["precision"])
    noise = 2 * f * lr**2
    position = noise * (2 - f) / (f * h * (4 - 2 * f - h))
    momentum = 2 * noise / (f * (4 - 2 * f - h))
    sampled = weights.detach()
    assert (sampled.var(1) / position - 1).abs().max() < VARIANCE_TOLERANCE
    assert (state["velocity"].var(1) / momentum - 1).abs().max() < VARIANCE_TOLERANCE
    # and those are the wanted ones, up to the size of a step
    assert (position * h / lr**2 - 1).abs().max() < 0.1
    assert (momentum / lr**2 - 1).abs().max() < 0.2


def test_adapted_scales_leave_the_target_as_it_is():
    torch.manual_seed(0)
    curvature = torch.tensor([1.0, 25.0, 400.0])[:, None]
    weights, optimizer = sampler((3, NUM_CHAINS), lr=0.01, friction=0.1, num_burn_in_steps=500)
    run(weights, optimizer, lambda theta: curvature * theta, 500)
    # V is now its own for each chain and depends on it: the chains have to forget that
    state = run(weights, optimizer, lambda theta: curvature * theta, 3000)
    assert state["V"][2].median() > 10 * state["V"][0].median()
    variance = 1 / (curvature.squeeze(1) + state["precision"])
    assert (weights.detach().var(1) / variance - 1).abs().max() < VARIANCE_TOLERANCE


@pytest.mark.parametrize("friction", [0.05, 0.2])
@pytest.mark.parametrize("resample_momentum", [1, 5, 10])
def test_resampled_momenta_do_not_change_the_target(resample_momentum, friction):
    torch.manual_seed(0)
    lr, curvature = 0.2, 1.0
    weights, optimizer = sampler(
        lr=lr, friction=friction, resample_momentum=resample_momentum, **FIXED_PRECISION
    )
    with torch.no_grad():
        weights.normal_().div_(math.sqrt(curvature + 1))
    # where each step has a new momentum a start is forgotten in (2 - friction) / h = 25 steps
    run(weights, optimizer, lambda theta: curvature * theta, 250)
    h = lr**2 * (curvature + 1)
    variance = 1 / (curvature + 1) / (1 - h / (4 - 2 * friction))  # without any momentum draws
    assert abs(weights.detach().var() / variance - 1) < VARIANCE_TOLERANCE


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "temperature", "resample_momentum"),
    [(500, 50, 1.0, 50), (500, 50, 0.25, 50), (500, 50, 1.0, 10), (2000, 100, 1.0, 50)],
)
def test_a_regression_trained_in_batches_has_its_posterior(
    num_rows, batch_size, temperature, resample_momentum
):
    torch.manual_seed(0)
    noise, num_chains = 0.5, 2000
    x = torch.randn(num_rows, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + noise * torch.randn(num_rows)
    covariance = torch.linalg.inv(x.T @ x / noise**2 / temperature + torch.eye(3))
    mean = covariance @ x.T @ y / noise**2 / temperature
    weights, optimizer = sampler(
        (num_chains, 3),
        lr=0.01,
        friction=0.05,
        temperature=temperature,
        num_train=num_rows,
        num_burn_in_steps=300,
        resample_momentum=resample_momentum,
        **FIXED_PRECISION,
    )
    with torch.no_grad():
        weights += mean

    sampled = []
    for _ in range(120):
        # New batches each epoch, without replacement; each chain has them in an order of its own.
        batches = torch.randperm(num_rows).view(-1, batch_size)
        gram = torch.einsum("bni,bnj->bij", x[batches], x[batches]) / batch_size / noise**2
        moment = torch.einsum("bni,bn->bi", x[batches], y[batches]) / batch_size / noise**2
        for batch in torch.rand(num_chains, len(batches)).argsort(dim=1).T:
            product = torch.einsum("cij,cj->ci", gram[batch], weights.detach())
            weights.grad = product - moment[batch]
            optimizer.step()
        sampled.append(weights.detach().clone())

    # Burn-in takes 30 epochs at most, the chains forget in about 5: 60 epochs are 12 draws or more.
    errors = (torch.stack(sampled[60:]) - mean) / covariance.diag().sqrt()
    standard_error = math.sqrt(2 / (12 * num_chains * 3))  # 0.5 %
    assert abs(errors.square().mean() - 1) < 0.03 + 3 * standard_error
    assert errors.mean((0, 1)).abs().max() < 5 / math.sqrt(12 * num_chains)


def test_large_gradient_noise_is_logged_once_with_its_share_of_the_weights(caplog):
    # V stays at 1, so that lr^2 V^(1/2) = 0.01 is compared with a fifth of the friction
    run(*sampler((4,), lr=0.1, friction=0.06), torch.zeros_like, 3)
    assert not caplog.records
    weights, optimizer = sampler((4,), lr=0.1, friction=0.04)
    run(weights, optimizer, torch.zeros_like, 1)
    run(weights, optimizer, torch.zeros_like, 3)
    (record,) = caplog.records
    message = record.getMessage()
    assert "for 100 % of the weights (at most 0.01; friction is 0.04)" in message
    assert "up to 0.13 times" in message
    assert "choose a smaller lr, more friction or larger batches" in message


def test_gradient_noise_is_judged_by_what_burn_in_has_learned(caplog):
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 1.0, 1.0, 300.0])
    weights, optimizer = sampler((4,), lr=0.01, friction=0.05, num_burn_in_steps=100)
    run(weights, optimizer, lambda theta: scale * torch.randn(4), 100)
    assert not caplog.records
    run(weights, optimizer, torch.zeros_like, 2)
    (record,) = caplog.records
    assert "for 25 % of the weights" in record.getMessage()


@pytest.mark.parametrize("seed_of_the_second", [0, 1])
def test_equal_seeds_agree_bit_for_bit_and_others_do_not(seed_of_the_second):
    chains = []
    for seed in (0, seed_of_the_second):
        torch.manual_seed(seed)
        weights, optimizer = sampler((50,), num_burn_in_steps=10, resample_prior=3)
        run(weights, optimizer, lambda theta: theta - 1, 30)
        chains.append(weights.detach())
    assert torch.equal(*chains) == (seed_of_the_second == 0)


def test_without_noise_the_sampler_is_an_optimizer_that_finds_the_mode():
    weights = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        theta = torch.zeros(3, requires_grad=True)
        sampler = SGHMC([theta], lr=0.05, num_train=100, num_burn_in_steps=0, noise=False)
        sampler.param_groups[0]["resample_prior"] = 0
        sampler.state[theta] = {
            "velocity": torch.zeros(3), "precision": 1.0,
            **{name: torch.ones(3) for name in ("tau", "g", "V")},
        }  # fmt: skip
        for _ in range(500):
            theta.grad = None
            (theta - 2).square().sum().div(2).backward()
            sampler.step()
        weights.append(theta.detach())
    assert torch.equal(*weights)
    mode = 2 * 100 / (100 + 1)  # of 100 |theta - 2|^2 / 2 + |theta|^2 / 2
    torch.testing.assert_close(weights[0], torch.full((3,), mode), rtol=1e-4, atol=0)


def test_precision_is_drawn_from_its_gamma_conditional_for_each_tensor():
    torch.manual_seed(0)
    tensors = [nn.Parameter(torch.full((6,), 2.0)), nn.Parameter(torch.full((4, 10), 0.1))]
    optimizer = SGHMC(
        tensors,
        lr=1e-12,  # holds the weights
        num_train=1,
        num_burn_in_steps=0,
        resample_prior=1,
        prior_shape=3.0,
        prior_rate=2.0,
    )
    num_draws = 2000
    draws: list[list[float]] = [[], []]
    for _ in range(num_draws):
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
        for index, tensor in enumerate(tensors):
            draws[index].append(optimizer.state[tensor]["precision"])
    # shape = 3 + n / 2, rate = 2 + |theta|^2 / 2
    for drawn, shape, rate in zip(draws, (6, 23), (2 + 12, 2 + 0.2), strict=True):
        precision = torch.tensor(drawn, dtype=torch.float64)
        mean, variance = shape / rate, shape / rate**2
        assert abs(precision.mean() - mean) < 5 * math.sqrt(variance / num_draws)
        kurtosis = 3 + 6 / shape
        assert abs(precision.var() / variance - 1) < 5 * math.sqrt((kurtosis - 1) / num_draws)


def test_precision_starts_with_a_draw_from_its_prior():
    torch.manual_seed(0)
    tensors = [nn.Parameter(torch.zeros(1)) for _ in range(4000)]
    optimizer = SGHMC(
        tensors, num_train=1, num_burn_in_steps=0, resample_prior=0, prior_shape=4, prior_rate=8
    )
    for tensor in tensors:
        tensor.grad = torch.zeros(1)
    optimizer.step()
    precision = torch.tensor([optimizer.state[tensor]["precision"] for tensor in tensors])
    assert abs(precision.mean() - 4 / 8) < 5 * math.sqrt(4 / 8**2 / 4000)
    assert abs(precision.var() / (4 / 8**2) - 1) < 5 * math.sqrt((2 + 6 / 4) / 4000)


def test_v_adapts_to_the_mean_square_of_the_gradients_and_is_fixed_after_burn_in():
    torch.manual_seed(0)
    num_train, gradient_std = 5, torch.tensor([2.0, 20.0])[:, None]
    weights, optimizer = sampler((2, 4000), lr=1e-12, num_train=num_train, num_burn_in_steps=300)

    def noise(theta: Tensor) -> Tensor:
        return gradient_std * torch.randn_like(theta)

    state = run(weights, optimizer, noise, 300)
    mean_square = (num_train * gradient_std.squeeze(1)).square()
    # an average over some tens of steps, of 4000 weights: its start at 1 is forgotten
    assert (state["V"].mean(1) / mean_square - 1).abs().max() < 0.05

    adapted = {name: state[name].clone() for name in ("tau", "g", "V")}
    state = run(weights, optimizer, noise, 5)
    for name, value in adapted.items():
        assert torch.equal(state[name], value)


def test_v_of_a_weight_without_influence_is_the_precision():
    torch.manual_seed(0)
    weights, optimizer = sampler((100,), lr=1e-12, num_burn_in_steps=500)
    state = run(weights, optimizer, torch.zeros_like, 500)
    torch.testing.assert_close(state["V"], torch.full((100,), state["precision"]))


def test_a_saved_state_goes_on_bit_for_bit():
    def gradient(theta: Tensor) -> Tensor:
        return theta - torch.linspace(-1, 1, 24).view(2, 3, 2, 2)

    torch.manual_seed(0)
    weights = nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last))
    options = {"num_train": 7, "num_burn_in_steps": 20, "resample_momentum": 5, "resample_prior": 3}
    optimizer = SGHMC([weights], **options)
    run(weights, optimizer, gradient, 13)

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    restored = nn.Parameter(copy.deepcopy(weights.detach()))
    resumed = SGHMC([restored], num_train=1, num_burn_in_steps=0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    random_state = torch.get_rng_state()
    state = run(weights, optimizer, gradient, 17)
    torch.set_rng_state(random_state)
    resumed_state = run(restored, resumed, gradient, 17)

    assert torch.equal(restored, weights)
    assert resumed.param_groups[0]["step"] == 30
    for name in ("velocity", "V", "tau", "g"):
        assert torch.equal(resumed_state[name], state[name])
    assert resumed_state["precision"] == state["precision"]


def test_weights_in_channels_last_move_against_their_own_gradients():
    weights = nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    target = torch.linspace(-1, 1, 120).view(2, 3, 4, 5)
    optimizer = SGHMC([weights], lr=1e-3, num_train=1, num_burn_in_steps=0, resample_prior=0)
    torch.manual_seed(0)
    state = run(weights, optimizer, lambda theta: 1e4 * (theta - target), 1000)
    mode = target * 1e4 / (1e4 + state["precision"])
    # each weight is within 6 of its standard deviations of 0.01
    torch.testing.assert_close(weights.detach(), mode, rtol=0, atol=0.06)


def test_closure_is_called_once_with_gradients_on_and_its_loss_returned():
    weights, optimizer = sampler((1,))

    def closure() -> Tensor:
        loss = (weights - 3).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 9
    assert weights.grad == -6
    assert weights != 0


def test_weights_without_a_gradient_are_left_alone():
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    optimizer = SGHMC([used, unused], num_train=1, num_burn_in_steps=0)
    used.grad = torch.ones(2)
    optimizer.step()
    assert used.ne(0).all()
    assert unused.eq(1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_an_error_with_the_step(value):
    weights, optimizer = sampler((3,), resample_prior=2)
    run(weights, optimizer, torch.zeros_like, 2)
    with torch.no_grad():
        weights[1] = value
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        run(weights, optimizer, torch.zeros_like, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", -1.0),
        ("friction", 0.0),
        ("friction", 1.1),
        ("temperature", -0.1),
        ("num_train", 0),
        ("num_burn_in_steps", -1),
        ("resample_momentum", -1),
        ("resample_prior", -1),
        ("prior_shape", 0.0),
        ("prior_rate", -1.0),
    ],
)
def test_a_bad_number_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        sampler((1,), **{name: value})


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimizers_of_torch_are_fused(name):
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], name, lr=0.5)
    assert type(optimizer) is OPTIMIZERS[name]
    assert optimizer.defaults["lr"] == 0.5
    assert optimizer.defaults["fused"]


def test_unknown_optimizers_and_options_are_refused_by_name():
    weights = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match="name='lion': unknown optimizer; choose one of adam"):
        make_optimizer(weights, "lion", lr=0.1)
    with pytest.raises(ValueError, match="friction"):
        make_optimizer(weights, "adam", friction=0.1)
    with pytest.raises(ValueError, match="num_train"):
        make_optimizer(weights, "sghmc", lr=0.1)
