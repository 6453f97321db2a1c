"""Training of the members of an ensemble, independently of each other."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from bqnn.arguments import ArgumentError
from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.ensemble import Ensemble
from bqnn.methods.base import Method
from bqnn.methods.terms import Terms
from bqnn.seeds import Stream


class EnsembleMethod(Method):
    """Base class for methods whose draws are the members of an ensemble.

    Attributes:
        net: The ensemble.
        growing: The options that give an ensemble more members.
    """

    net: Ensemble
    growing: ClassVar[tuple[str, ...]] = ("num_members",)

    def trained_networks(self) -> list[nn.Module]:
        return [self.net.current]

    @property
    def available_samples(self) -> int:
        return min(self.num_samples, max(len(self.net), 1))

    def check_samples(self, num_samples: int | None) -> int:
        """Return the number of draws; ValueError if the ensemble has fewer members."""
        available = max(len(self.net), 1)
        if num_samples is not None and num_samples > available:
            raise ArgumentError(
                f"num_samples={num_samples}: this ensemble has {available} members; ask for at "
                f"most {available}, or train with more ({', '.join(self.growing)})",
                *("num_samples", *self.growing),
            )
        return super().check_samples(num_samples)


class MemberTraining(EnsembleMethod):
    """Base class for methods that train all members of an ensemble at once.

    Each member is trained by its own loss, on the same batches. The logged terms are means over
    members.
    """

    imitated: Sequence[nn.Module] = ()  # not modules of this one, so that no checkpoint has them

    def imitate_members(self) -> None:
        """Train each member towards what its present network predicts, not towards the targets.

        All members are trained towards the same targets, and become more alike by it. With few
        bits, a member can so follow its own network in float, and the ensemble keeps its
        disagreement.
        """
        copies = [deepcopy(member) for member in self.net.members]
        self.imitated = [copy.eval().requires_grad_(False) for copy in copies]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for network in self.imitated:
            network.to(self.device)

    def trained_parameters(self) -> list[nn.Parameter]:
        return [param for param in self.net.members.parameters() if param.requires_grad]

    def trained_networks(self) -> list[nn.Module]:
        return list(self.net.members)

    def member_terms(self, member: nn.Module, inputs: Tensor, targets: Tensor) -> Terms:
        """Return the loss of a member for a batch as `loss`, and its terms by name."""
        nll = self.member_nll(member, inputs, targets)
        return {"loss": nll, "nll": nll}

    def member_nll(self, member: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the NLL of the targets, or the expected one of what `imitated` predicts."""
        if not self.imitated:
            return self.likelihood.loss(member(inputs), targets)
        number = next(i for i, own in enumerate(self.net.members) if own is member)
        with torch.no_grad():
            other = self.imitated[number](inputs)
        return self.likelihood.expected_loss(member(inputs), other)

    def loss_terms(self, inputs: Tensor, targets: Tensor) -> Terms:
        """Return means over members. The gradients of `loss` are those of the members' losses."""
        gradients: dict[nn.Parameter, Tensor] = {}
        all_terms = []
        for member in self.net.members:
            terms = self.member_terms(member, inputs, targets)
            loss = terms["loss"]
            assert isinstance(loss, Tensor)
            gradients |= _gradients(loss, member)  # one backward pass per member, to limit memory
            all_terms.append({name: torch.as_tensor(term).detach() for name, term in terms.items()})
        means = {
            name: torch.stack([terms[name] for terms in all_terms]).mean() for name in all_terms[0]
        }
        loss = _with_gradients(means["loss"], [*gradients], [*gradients.values()])
        return {**means, "loss": loss}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_algorithm == "value" or not gradient_clip_val:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
            return
        for member in self.net.members:  # each has its own norm
            nn.utils.clip_grad_norm_(member.parameters(), gradient_clip_val)


class MemberTuning(MemberTraining):
    r"""Train each member of an ensemble towards the mode of its posterior.

    The loss of a member is its mean NLL plus `prior_weight * temperature / num_train` times

        -log p(w) = \sum_k precision_k / 2 * |w_k|^2 + const,

    over its tensors w_k. The precision of a tensor is the mean of the Gamma posterior from which
    `bqnn.optim.SGHMC` draws it, given the weights. The learning rate falls to 0 along a cosine,
    step by step.

    Args:
        net: An ensemble with at least one member.
        prior_weight: Factor of the prior's part of the loss.
        temperature: The temperature of the sampler, which also scales the prior's part.
        prior_shape: Shape of the Gamma prior of the precisions.
        prior_rate: Rate of the Gamma prior of the precisions.
        options: Arguments of `Method`.
    """

    def __init__(
        self,
        net: Ensemble,
        likelihood: Likelihood,
        *,
        prior_weight: float,
        temperature: float,
        prior_shape: float,
        prior_rate: float,
        **options: Any,
    ) -> None:
        super().__init__(net, likelihood, schedule="cosine_by_step", **options)
        self.prior_weight = prior_weight
        self.temperature = temperature
        self.prior_shape = prior_shape
        self.prior_rate = prior_rate
        self.stream = Stream.FINE_TUNING
        self.net.members.requires_grad_(True)

    def member_terms(self, member: nn.Module, inputs: Tensor, targets: Tensor) -> Terms:
        nll = self.member_nll(member, inputs, targets)
        prior = self.prior_energy(member)
        scale = self.prior_weight * self.temperature / self.num_train
        return {"loss": nll + scale * prior, "nll": nll, "prior": prior}

    def prior_energy(self, member: nn.Module) -> Tensor:
        """Return -log p(w) of a member up to a constant, in nats."""
        energies = []
        for param in member.parameters():
            square = param.square().sum()
            shape = self.prior_shape + param.numel() / 2
            precision = shape / (self.prior_rate + square.detach() / 2)
            energies.append(precision * square / 2)
        return torch.stack(energies).sum()


def _gradients(loss: Tensor, net: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of a loss, without a change of `grad` of the parameters.

    Unlike `torch.autograd.grad`, it supports reentrant activation checkpoints.
    """
    before = {param: param.grad for param in net.parameters() if param.requires_grad}
    for param in before:
        param.grad = None
    loss.backward()
    found = {param: param.grad for param in before if param.grad is not None}
    for param, grad in before.items():
        param.grad = grad
    return found


def _with_gradients(value: Tensor, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return a scalar whose backward pass gives each parameter its gradient.

    Args:
        value: The scalar.
        params: Leaf tensors that require gradients.
        gradients: The gradient of the scalar with respect to each parameter. They are not changed.

    Examples:
        >>> param = torch.zeros(2, requires_grad=True)
        >>> loss = _with_gradients(torch.tensor(1.0), [param], [torch.tensor([3.0, 4.0])])
        >>> (2 * loss).backward()
        >>> param.grad
        tensor([6., 8.])
    """
    out: Tensor = _WithGradients.apply(value, gradients, *params)
    return out


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        return None, None, *torch._foreach_mul(ctx.gradients, factor)
