"""Optimizers and samplers, and the table that names them."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Gamma
from torch.optim import SGD, Adam, AdamW, Optimizer

from bqnn.arguments import ArgumentError, real_number, whole_number

log = logging.getLogger(__name__)

# Limit of lr^2 V^(1/2) / friction. Gradient noise adds at most half of it, 10 %, to a variance.
LARGEST_NOISE = 0.2


class SGHMC(Optimizer):
    """Scale-adapted stochastic gradient Hamiltonian Monte Carlo (Springenberg et al., 2016).

    The sampler draws from exp(-U) with

        U(theta) = num_train / temperature * (mean NLL) + precision / 2 * |theta|^2,

    where the gradients of the parameters are those of the mean NLL. The temperature scales only
    the likelihood, so that the prior and the Gibbs step of its precision are exact at any
    temperature. With M = V^(-1/2), a step is

        v <- (1 - friction) v - lr^2 M grad U + N(0, 2 friction lr^2 M)
        theta <- theta + v.

    For a Gaussian exp(-U) with curvature c, the mean is exact, and the variance is that of exp(-U)
    divided by 1 - lr^2 M c / (4 - 2 friction).

    Gradient noise: unlike the paper, the step has no correction for the noise of the gradients. The
    correction, lr^4, assumes noise of variance V that is independent between steps. However, each
    epoch contains every row once, so the noise cancels over an epoch that is short compared with
    the memory of the chain. Noise that does not cancel increases a variance by at most the share
    lr^2 V^(1/2) / (2 friction). After burn-in, a warning reports the weights for which this share
    exceeds 0.1.

    Burn-in: in the first `num_burn_in_steps` steps, V adapts for each weight (eq. 7 to 9 of the
    paper). It is an average of squared gradients over a window of 1 + tau steps. Afterwards it is
    fixed. V is never below the precision, which is the mean square of the prior's gradient;
    otherwise the step of a weight without influence on the likelihood would be unstable.

    Momentum: every `resample_momentum` steps, v is drawn from N(D / 2 grad U, D) with
    D = lr^2 M / (1 - friction / 2), its distribution given theta. Its mean is not zero, because v
    belongs to the middle of the last step, and theta to its end.

    Prior: the precision, one number per tensor, has a Gamma(prior_shape, prior_rate) prior. Every
    `resample_prior` steps, it is drawn from its conditional distribution
    Gamma(prior_shape + n / 2, prior_rate + |theta|^2 / 2) for a tensor of n weights.

    The `state_dict` contains the step, tau, g, V, momentum and precision.

    Args:
        params: The parameters, or groups of them.
        lr: The step size.
        num_train: The number of training rows.
        num_burn_in_steps: The number of burn-in steps.
        friction: The share of momentum that a step loses, in (0, 1].
        temperature: The temperature of the likelihood; 1 samples the posterior.
        resample_momentum: The number of steps between draws of the momentum; 0 turns them off.
        resample_prior: The number of steps between draws of the precision; 0 turns them off.
        prior_shape: The shape of the Gamma prior.
        prior_rate: The rate of the Gamma prior.
        noise: Whether steps and momenta are random. Without noise, the sampler is an optimizer.

    Raises:
        ValueError: A number is out of range.
        FloatingPointError: `step` finds a weight that is not finite when it draws the precision.

    Examples:
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> sampler = SGHMC([theta], lr=0.01, num_train=100, num_burn_in_steps=10)
        >>> (theta - 1).square().mean().backward()
        >>> sampler.step()
        >>> sampler.param_groups[0]["step"], bool((theta != 0).all())
        (1, True)
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        *,
        num_train: int,
        num_burn_in_steps: int,
        friction: float = 0.05,
        temperature: float = 1.0,
        resample_momentum: int = 10,
        resample_prior: int = 5,
        prior_shape: float = 10.0,
        prior_rate: float = 10.0,
        noise: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "num_train": num_train,
            "num_burn_in_steps": num_burn_in_steps,
            "friction": friction,
            "temperature": temperature,
            "resample_momentum": resample_momentum,
            "resample_prior": resample_prior,
            "prior_shape": prior_shape,
            "prior_rate": prior_rate,
            "noise": noise,
            "step": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for name, check in _CHECKS.items():
            check(name, {**self.defaults, **param_group}[name])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        states = [self._state_of(param, group) for param in params]
        velocity = [state["velocity"] for state in states]
        v_hat = [state["V"] for state in states]
        lr, step = group["lr"], group["step"]

        force = torch._foreach_mul(params, [state["precision"] for state in states])
        scale = group["num_train"] / group["temperature"]
        torch._foreach_add_(force, [param.grad for param in params], alpha=scale)
        if step < group["num_burn_in_steps"]:
            _adapt([s["tau"] for s in states], [s["g"] for s in states], v_hat, force)
            torch._foreach_clamp_min_(v_hat, [state["precision"] for state in states])

        inverse_mass = torch._foreach_sqrt(v_hat)
        if step == group["num_burn_in_steps"]:
            _warn_of_large_noise(inverse_mass, lr, group["friction"])
        torch._foreach_reciprocal_(inverse_mass)

        has_noise = group.get("noise", True)  # older states have no such key
        every = group["resample_momentum"]
        if has_noise and every and step % every == 0:
            _draw_momentum(velocity, inverse_mass, force, lr, group["friction"])
        every = group["resample_prior"]
        if every and step % every == 0:
            squares = torch.stack(torch._foreach_norm(params)).double().square().tolist()
            if not all(map(math.isfinite, squares)):
                raise FloatingPointError(
                    f"SGHMC: a weight is not finite at step {step}; choose a smaller lr"
                )
            for state, param, square in zip(states, params, squares, strict=True):
                shape = group["prior_shape"] + param.numel() / 2
                rate = group["prior_rate"] + square / 2
                state["precision"] = _gamma(shape, rate)

        torch._foreach_mul_(velocity, 1 - group["friction"])
        torch._foreach_addcmul_(velocity, inverse_mass, force, value=-(lr**2))
        if has_noise:
            torch._foreach_mul_(inverse_mass, 2 * group["friction"] * lr**2)
            torch._foreach_sqrt_(inverse_mass)  # now the standard deviation of the noise
            torch._foreach_addcmul_(velocity, inverse_mass, _noise(params))
        torch._foreach_add_(params, velocity)
        group["step"] = step + 1

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            state["velocity"] = torch.zeros_like(param)
            for name in ("tau", "g", "V"):
                state[name] = torch.ones_like(param)
            state["precision"] = _gamma(group["prior_shape"], group["prior_rate"])
        return state


def _positive(name: str, value: object) -> float:
    return real_number(name, value, "choose more than 0", 0, without=(0,))


def _count(name: str, value: object) -> int:
    return whole_number(name, value, "a number of steps; choose 0 or more", 0)


_CHECKS: dict[str, Callable[[str, object], float]] = {
    "lr": _positive,
    "num_train": lambda name, value: whole_number(
        name, value, "the number of training rows; choose 1 or more", 1
    ),
    "num_burn_in_steps": _count,
    "friction": lambda name, value: real_number(
        name, value, "the share of momentum lost in a step; choose above 0 to 1", 0, 1, (0,)
    ),
    "temperature": _positive,
    "resample_momentum": _count,
    "resample_prior": _count,
    "prior_shape": _positive,
    "prior_rate": _positive,
}


OPTIMIZERS: dict[str, type[Optimizer]] = {"adam": Adam, "adamw": AdamW, "sgd": SGD, "sghmc": SGHMC}


def make_optimizer(
    params: Iterable[Tensor] | Iterable[dict[str, Any]], name: str, **options: Any
) -> Optimizer:
    """Create an optimizer by name. torch's optimizers use fused kernels.

    Args:
        params: The parameters, or groups of them.
        name: A key of `OPTIMIZERS`.
        options: Arguments of the optimizer.

    Raises:
        ValueError: The name is unknown, or an option is invalid.

    Examples:
        >>> type(make_optimizer([torch.zeros(2, requires_grad=True)], "adam", lr=1e-3))
        <class 'torch.optim.adam.Adam'>
    """
    if name not in OPTIMIZERS:
        raise ArgumentError(
            f"name={name!r}: unknown optimizer; choose one of {', '.join(OPTIMIZERS)}", "name"
        )
    if name != "sghmc":
        options["fused"] = True
    try:
        return OPTIMIZERS[name](params, **options)
    except TypeError as error:
        raise ArgumentError(
            f"name={name}: invalid options {options}: {error}; correct them", "name"
        ) from error


def _adapt(tau: list[Tensor], g: list[Tensor], v_hat: list[Tensor], force: Any) -> None:
    """Update g and V, averages of the gradient and of its square over 1 + tau steps, and tau."""
    weight = torch._foreach_add(tau, 1)
    torch._foreach_reciprocal_(weight)
    torch._foreach_lerp_(g, force, weight)
    torch._foreach_lerp_(v_hat, torch._foreach_mul(force, force), weight)
    # tau <- 1 + tau (1 - g^2 / V): the window is shorter if the gradient keeps its sign.
    change = torch._foreach_mul(g, g)
    torch._foreach_div_(change, v_hat)
    torch._foreach_mul_(change, tau)
    torch._foreach_sub_(tau, change)
    torch._foreach_add_(tau, 1)


def _draw_momentum(
    velocity: list[Tensor], inverse_mass: Any, force: Any, lr: float, friction: float
) -> None:
    variance = torch._foreach_mul(inverse_mass, lr**2 / (1 - friction / 2))
    torch._foreach_copy_(velocity, torch._foreach_mul(variance, force))
    torch._foreach_mul_(velocity, 0.5)
    torch._foreach_sqrt_(variance)
    torch._foreach_addcmul_(velocity, variance, _noise(velocity))


def _warn_of_large_noise(root_v: Any, lr: float, friction: float) -> None:
    """Warn if lr^2 V^(1/2), the effect of gradient noise, is not negligible."""
    limit = LARGEST_NOISE * friction / lr**2
    num_above = sum(int((root > limit).sum()) for root in root_v)
    if not num_above:
        return
    largest = lr**2 * max(float(root.max()) for root in root_v)
    log.warning(
        "SGHMC: lr^2 sqrt(V) is above %g friction for %.3g %% of the weights (at most %.2g; "
        "friction is %g): gradient noise that does not cancel over an epoch adds up to %.2g times "
        "the posterior's variance; choose a smaller lr, more friction or larger batches",
        LARGEST_NOISE,
        100 * num_above / sum(root.numel() for root in root_v),
        largest,
        friction,
        largest / (2 * friction),
    )


def _noise(params: list[Tensor]) -> list[Tensor]:
    """Draw N(0, 1) noise with the shapes and layouts of the parameters, in one call."""
    sizes = [param.numel() for param in params]
    flat = torch.randn(sum(sizes), dtype=params[0].dtype, device=params[0].device)
    return [
        part.as_strided(param.shape, param.stride())
        for part, param in zip(flat.split(sizes), params, strict=True)
    ]


def _gamma(shape: float, rate: float) -> float:
    return float(Gamma(shape, rate).sample())
