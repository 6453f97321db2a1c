"""SGHMC: an ensemble of networks sampled from the posterior by one Markov chain."""

import logging
import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.ensemble import Ensemble
from bqnn.methods.base import Batch, Method, Terms
from bqnn.optim import make_optimizer

log = logging.getLogger(__name__)


class SGHMCEnsemble(Method):
    """Samples the weights with `bqnn.optim.SGHMC` and keeps the last `num_members` collected.

    burn_in: epochs in which the sampler adapts and nothing is collected; collect_every: epochs
    from one member to the next, the first that long after burn-in.
    """

    net: Ensemble

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        *,
        burn_in: int,
        collect_every: int,
        num_members: int,
        **options: Any,
    ) -> None:
        if burn_in < 0 or collect_every < 1:
            raise ValueError(
                f"method.burn_in={burn_in}, method.collect_every={collect_every}: in epochs, at "
                "least 0 and 1"
            )
        super().__init__(Ensemble(net, num_members), likelihood, **options)
        self.burn_in = burn_in
        self.collect_every = collect_every
        self._said_empty = False
        self._prior_weight: float | None = None  # while the members are fine-tuned

    @property
    def available_samples(self) -> int:
        return min(self.num_samples, max(len(self.net), 1))

    def check_samples(self, num_samples: int | None) -> int:
        """ValueError: the ensemble has fewer members."""
        available = max(len(self.net), 1)
        if num_samples is not None and num_samples > available:
            raise ValueError(
                f"num_samples={num_samples}: this ensemble has {available} members; ask for at "
                f"most {available}, or train with more (method.num_members, method.collect_every)"
            )
        self._say_if_empty()
        return super().check_samples(num_samples)

    def configure_callbacks(self) -> list[pl.Callback]:
        return [CollectMembers()] if self._prior_weight is None else []

    def fine_tune(self, optimizer: dict[str, Any], prior_weight: float) -> None:
        """Train the members, each on its own, towards the mode of the posterior it was drawn from.

        They see the same batches. The prior's precision of each tensor is its expectation under
        the Gamma posterior that the sampler draws it from, given the member's weights. An
        ensemble without members gets the current network as its only one.
        """
        # With the values that the options leave to the sampler.
        sampler = make_optimizer(
            self.net.current.parameters(), **self.optimizer, num_train=1, num_burn_in_steps=0
        )
        self._sampler = sampler.defaults
        self._prior_weight = prior_weight
        self.automatic_optimization = False  # a step per member, so that memory does not grow
        if len(self.net) == 0:
            self._say_if_empty()
            self.net.collect()
        for member in self.net.members:
            member.requires_grad_(True)
        super().fine_tune(optimizer, prior_weight)

    def seed_epoch(self) -> None:
        # The sampler's noise and its Gibbs draws have to be the same on every rank.
        self.seed_draws(rank=0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        inputs, targets = batch
        if self._prior_weight is None:
            sampled = super().training_step(batch, batch_idx)
            return None if sampled is None else sampled * self._weight_of(len(targets))
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
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
        self._record(means, len(targets))
        optimizer.step()
        schedule = self.lr_schedulers()
        assert isinstance(schedule, LRScheduler)
        schedule.step()
        return None

    def _weight_of(self, num_rows: int) -> float:
        """A batch's rows as a multiple of the mean number in a batch, or in a step's batches."""
        batches, largest = int(self.trainer.num_training_batches), self._epoch_rows[0]
        rows = min(math.ceil(self.num_train / self.trainer.world_size), batches * largest)
        # Lightning divides by the first of these, also where the last step has fewer batches.
        return num_rows * self.trainer.accumulate_grad_batches * self.steps_per_epoch / rows

    def member_terms(self, member: nn.Module, inputs: Tensor, targets: Tensor) -> Terms:
        """The loss that a member is fine-tuned by, and the terms it is made of."""
        assert self._prior_weight is not None
        nll = self.likelihood.loss(member(inputs), targets)
        prior = self._prior_energy(member)
        scale = self._prior_weight * self._sampler["temperature"] / self.num_train
        return {"loss": nll + scale * prior, "nll": nll, "prior": prior}

    def _prior_energy(self, member: nn.Module) -> Tensor:
        """-log p(weights) up to a constant, in nats: sum of precision / 2 * |w|^2 over tensors."""
        options = self._sampler
        energies = []
        for param in member.parameters():
            square = param.square().sum()
            shape = options["prior_shape"] + param.numel() / 2
            precision = shape / (options["prior_rate"] + square.detach() / 2)
            energies.append(precision * square / 2)
        return torch.stack(energies).sum()

    def optimizer_options(self, steps_per_epoch: int) -> dict[str, Any]:
        if self._prior_weight is not None:
            return self.optimizer
        burn_in = self.burn_in * steps_per_epoch
        return {**self.optimizer, "num_train": self.num_train, "num_burn_in_steps": burn_in}

    def trained_parameters(self) -> list[nn.Parameter]:
        if self._prior_weight is not None:
            return list(self.net.members.parameters())
        return list(self.net.current.parameters())

    def on_fit_start(self) -> None:
        super().on_fit_start()
        clip = self.trainer.gradient_clip_val
        if clip:
            raise ValueError(
                f"trainer.gradient_clip_val={clip}: clipped gradients are not those of the "
                "posterior that sghmc samples; leave it out, and choose a smaller "
                "method.optimizer.lr where the chain is not stable"
            )
        first = self.burn_in + self.collect_every
        if self._prior_weight is None and first > (self.trainer.max_epochs or 0):
            log.warning(
                "the ensemble stays empty: its first member comes after epoch %d (method.burn_in + "
                "method.collect_every) and trainer.max_epochs is %d",
                first,
                self.trainer.max_epochs,
            )

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        if not self._said_empty:
            self._say_if_empty()

    def on_test_epoch_start(self) -> None:
        self._say_if_empty()

    def _say_if_empty(self) -> None:
        if len(self.net) == 0:
            self._said_empty = True
            log.warning(
                "no member is collected yet (burn-in takes %d epochs): evaluating the current "
                "network",
                self.burn_in,
            )


class CollectMembers(pl.Callback):
    """Adds the network to the ensemble every `collect_every` epochs after `burn_in` epochs."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SGHMCEnsemble)
        sampled = trainer.current_epoch + 1 - pl_module.burn_in
        if sampled > 0 and sampled % pl_module.collect_every == 0:
            pl_module.net.collect()
