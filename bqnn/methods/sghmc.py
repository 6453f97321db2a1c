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
        self._said_empty = False

    @property
    def available_samples(self) -> int:
        return min(self.num_samples, max(len(self.net), 1))

    def configure_callbacks(self) -> list[pl.Callback]:
        return [CollectMembers()]

    def optimizer_options(self, steps_per_epoch: int) -> dict[str, Any]:
        burn_in = self.burn_in * steps_per_epoch
        return {**self.optimizer, "num_train": self.num_train, "num_burn_in_steps": burn_in}

    def trained_parameters(self) -> list[nn.Parameter]:
        return list(self.net.current.parameters())

    def on_fit_start(self) -> None:
        super().on_fit_start()
        first = self.burn_in + self.collect_every
        if first > (self.trainer.max_epochs or 0):
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
