"""Fine-tune the members of an ensemble, each on its own."""

from typing import Any

import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.ensemble import Ensemble
from bqnn.methods.base import Batch, Method
from bqnn.methods.terms import Terms
from bqnn.seeds import Stream


class MemberTuning(Method):
    r"""Trains each member of an ensemble towards the mode of the posterior it was drawn from.

    A member's loss is its mean NLL plus `prior_weight * temperature / num_train` times

        -log p(w) = \sum_k precision_k / 2 * |w_k|^2 + const,

    over its tensors w_k. The precision of a tensor is its expectation under the Gamma posterior
    that `bqnn.optim.SGHMC` draws it from, given the member's weights. All members see the same
    batches, and the terms that are logged are means over members. The learning rate falls to 0
    along a cosine, step by step.

    Args:
        net: An ensemble with one member or more.
        prior_weight: Factor of the prior's part of the loss.
        temperature: The temperature of the sampler, which scales the prior's part as well.
        prior_shape: Shape of the Gamma prior of the precisions.
        prior_rate: Rate of the Gamma prior of the precisions.
        options: For `Method`.
    """

    net: Ensemble

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
        self.automatic_optimization = False  # a backward pass per member: memory does not grow
        for member in net.members:
            member.requires_grad_(True)

    @property
    def available_samples(self) -> int:
        return min(self.num_samples, len(self.net))

    def trained_parameters(self) -> list[nn.Parameter]:
        return list(self.net.members.parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        inputs, targets = batch
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(schedule, LRScheduler)
        optimizer.zero_grad()
        all_terms = []
        for member in self.net.members:
            terms = self.member_terms(member, inputs, targets)
            loss = terms["loss"]
            assert isinstance(loss, Tensor)
            self.manual_backward(loss)
            all_terms.append({name: torch.as_tensor(term).detach() for name, term in terms.items()})
        means: Terms = {
            name: torch.stack([terms[name] for terms in all_terms]).mean() for name in all_terms[0]
        }
        self.epoch_terms.record(means, len(targets))
        optimizer.step()
        schedule.step()

    def member_terms(self, member: nn.Module, inputs: Tensor, targets: Tensor) -> Terms:
        """The loss of a member for a batch under `loss`, and the terms it is made of."""
        nll = self.likelihood.loss(member(inputs), targets)
        prior = self.prior_energy(member)
        scale = self.prior_weight * self.temperature / self.num_train
        return {"loss": nll + scale * prior, "nll": nll, "prior": prior}

    def prior_energy(self, member: nn.Module) -> Tensor:
        """-log p(w) of a member's weights up to a constant, in nats."""
        energies = []
        for param in member.parameters():
            square = param.square().sum()
            shape = self.prior_shape + param.numel() / 2
            precision = shape / (self.prior_rate + square.detach() / 2)
            energies.append(precision * square / 2)
        return torch.stack(energies).sum()
