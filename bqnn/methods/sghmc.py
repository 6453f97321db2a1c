"""SGHMC: an ensemble of networks sampled from the posterior by one Markov chain."""

import logging
from typing import Any

import pytorch_lightning as pl
from torch import nn

from bqnn.layers.ensemble import Ensemble
from bqnn.likelihoods import Likelihood
from bqnn.methods.base import Method

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

    @property
    def available_samples(self) -> int:
        return min(self.num_samples, max(len(self.net), 1))

    def configure_callbacks(self) -> list[pl.Callback]:
        return [CollectMembers(self.burn_in, self.collect_every)]

    def configure_optimizers(self) -> Any:
        assert self.trainer.max_epochs is not None
        steps_per_epoch = self.trainer.estimated_stepping_batches // self.trainer.max_epochs
        self.optimizer = {
            **self.optimizer,
            "num_train": self.num_train,
            "num_burn_in_steps": self.burn_in * int(steps_per_epoch),
        }
        return super().configure_optimizers()

    def trained_parameters(self) -> list[nn.Parameter]:
        return list(self.net.current.parameters())

    def on_test_epoch_start(self) -> None:
        if len(self.net) == 0:
            log.warning(
                "the ensemble has no members yet (burn_in=%d epochs, then one every %d): "
                "evaluating the current network",
                self.burn_in,
                self.collect_every,
            )


class CollectMembers(pl.Callback):
    """Adds the network to the ensemble every `collect_every` epochs after `burn_in` epochs."""

    def __init__(self, burn_in: int, collect_every: int) -> None:
        self.burn_in = burn_in
        self.collect_every = collect_every

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SGHMCEnsemble)
        sampled = trainer.current_epoch + 1 - self.burn_in
        if sampled > 0 and sampled % self.collect_every == 0:
            pl_module.net.collect()
