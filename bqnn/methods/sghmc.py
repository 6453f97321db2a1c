"""SGHMC: an ensemble of networks that one Markov chain samples from the posterior."""

import logging
import math
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from bqnn.arguments import ArgumentError, whole_number
from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.ensemble import Ensemble
from bqnn.methods.base import Batch
from bqnn.methods.members import EnsembleMethod, MemberTuning
from bqnn.optim import make_optimizer

log = logging.getLogger(__name__)


class SGHMCEnsemble(EnsembleMethod):
    """Sample weights with `bqnn.optim.SGHMC`, and keep the last networks of the chain.

    Args:
        net: The network. It is converted to an `Ensemble`.
        burn_in: The number of epochs in which the sampler adapts, and no member is collected.
        collect_every: The number of epochs between members, and between burn-in and the first.
        num_members: The maximum number of members; older ones are dropped.
        options: Arguments of `Method`.

    Examples:
        >>> import torch
        >>> from bqnn.inference.likelihoods import Regression
        >>> from bqnn.nets import MLP
        >>> net, likelihood = MLP([3], [1, 1], hidden_features=[4]), Regression(0.0, 1.0)
        >>> options = {"num_train": 100, "seed": 0, "optimizer": {"name": "sghmc"}}
        >>> options |= {"burn_in": 9, "collect_every": 1, "num_members": 5}
        >>> method = SGHMCEnsemble(net, likelihood, **options)
        >>> method.eval().predictive(torch.zeros(2, 3)).shape
        torch.Size([1, 2, 2])
    """

    growing = ("num_members", "collect_every")

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
        burn_in = whole_number("burn_in", burn_in, "in epochs, 0 or more", 0)
        reason = "in epochs, 1 or more"
        collect_every = whole_number("collect_every", collect_every, reason, 1)
        super().__init__(Ensemble(net, num_members), likelihood, **options)
        self.burn_in = burn_in
        self.collect_every = collect_every
        self._said_empty = False

    def check_samples(self, num_samples: int | None) -> int:
        """Return the number of draws; ValueError if the ensemble has fewer members."""
        count = super().check_samples(num_samples)
        self._say_if_empty()
        return count

    def configure_callbacks(self) -> list[pl.Callback]:
        return [*super().configure_callbacks(), CollectMembers()]

    def fine_tuning(self, optimizer: dict[str, Any], prior_weight: float) -> MemberTuning:
        """Return a method that trains the members; an empty ensemble gets the current network."""
        if len(self.net) == 0:
            self._say_if_empty()
            self.net.collect()
        # Missing options have the defaults of the sampler.
        sampler = make_optimizer(
            self.net.current.parameters(), **self.optimizer, num_train=1, num_burn_in_steps=0
        )
        prior = {name: sampler.defaults[name] for name in ("prior_shape", "prior_rate")}
        tuning = MemberTuning(
            self.net,
            self.likelihood,
            num_train=self.num_train,
            seed=self.seed,
            optimizer=optimizer,
            num_samples=self.num_samples,
            val_samples=self.val_samples,
            prior_weight=prior_weight,
            temperature=sampler.defaults["temperature"],
            **prior,
        )
        tuning.recipe = self.recipe
        return tuning

    def seed_epoch(self) -> None:
        # The noise and the Gibbs draws of the sampler must be equal on all ranks.
        self.seed_draws(rank=0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        return loss * self._weight_of(len(batch[1]))

    def _weight_of(self, num_rows: int) -> float:
        """Return the rows of a batch divided by the mean number of rows per batch or step."""
        batches, largest = int(self.trainer.num_training_batches), self.epoch_terms.rows[0]
        rows = min(math.ceil(self.num_train / self.trainer.world_size), batches * largest)
        # Lightning divides by accumulate_grad_batches, even if the last step has fewer batches.
        return num_rows * self.trainer.accumulate_grad_batches * self.steps_per_epoch / rows

    def optimizer_options(self, steps_per_epoch: int) -> dict[str, Any]:
        burn_in = self.burn_in * steps_per_epoch
        return {**self.optimizer, "num_train": self.num_train, "num_burn_in_steps": burn_in}

    def trained_parameters(self) -> list[nn.Parameter]:
        return list(self.net.current.parameters())

    def on_fit_start(self) -> None:
        super().on_fit_start()
        clip = self.trainer.gradient_clip_val
        if clip:
            raise ArgumentError(
                f"gradient_clip_val={clip}: clipped gradients are not those of the posterior that "
                "sghmc samples; leave it out, and choose a smaller optimizer.lr where the chain is "
                "not stable",
                *("gradient_clip_val", "optimizer.lr"),
            )
        first = self.burn_in + self.collect_every
        if first > (self.trainer.max_epochs or 0):
            log.warning(
                "the ensemble stays empty: its first member comes after epoch %d (burn_in + "
                "collect_every) and max_epochs is %d",
                first,
                self.trainer.max_epochs,
            )

    def on_validation_epoch_start(self) -> None:
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
    """Add the network to the ensemble every `collect_every` epochs after `burn_in` epochs."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SGHMCEnsemble)
        sampled = trainer.current_epoch + 1 - pl_module.burn_in
        if sampled > 0 and sampled % pl_module.collect_every == 0:
            pl_module.net.collect()
