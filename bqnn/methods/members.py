"""Fine-tuning of the members of an ensemble, independently of each other."""

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
    r"""Train each member of an ensemble towards the mode of its posterior.

    The loss of a member is its mean NLL plus `prior_weight * temperature / num_train` times

        -log p(w) = \sum_k precision_k / 2 * |w_k|^2 + const,

    over its tensors w_k. The precision of a tensor is the mean of the Gamma posterior from which
    `bqnn.optim.SGHMC` draws it, given the weights. All members see the same batches, and the
    logged terms are means over members. The learning rate falls to 0 along a cosine, step by
    step.

    Args:
        net: An ensemble with at least one member.
        prior_weight: Factor of the prior's part of the loss.
        temperature: The temperature of the sampler, which also scales the prior's part.
        prior_shape: Shape of the Gamma prior of the precisions.
        prior_rate: Rate of the Gamma prior of the precisions.
        options: Arguments of `Method`.
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
        self.automatic_optimization = False  # one backward pass per member, to limit memory
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
        """Return the loss of a member for a batch as `loss`, and its terms by name."""
        nll = self.likelihood.loss(member(inputs), targets)
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
