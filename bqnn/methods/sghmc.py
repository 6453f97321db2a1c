"""SGHMC: an ensemble of networks that Markov chains sample from the posterior."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from bqnn.arguments import ArgumentError
from bqnn.inference.convergence import FEWEST, effective_sample_size, split_rhat
from bqnn.inference.likelihoods import Likelihood
from bqnn.inference.predictions import Prediction
from bqnn.layers.ensemble import Ensemble
from bqnn.methods.base import Batch
from bqnn.methods.members import EnsembleMethod, MemberTuning
from bqnn.methods.sampling import SamplingPlan
from bqnn.methods.terms import Terms
from bqnn.optim import make_optimizer

log = logging.getLogger(__name__)


class SGHMCEnsemble(EnsembleMethod):
    """Sample weights with `bqnn.optim.SGHMC`, and keep the last networks of each chain.

    Chains run one after another. Each starts from new initial weights, with an optimization: the
    sampler without noise.

    With cycles (Zhang et al., 2020), the squared step size falls from that of the optimizer to 0
    along a cosine, again and again. The first part of a cycle is an optimization, too. Members are
    collected at its end.

    Args:
        net: The network. It is converted to an `Ensemble`.
        burn_in: The number of epochs in which the sampler adapts, and no member is collected.
        collect_every: The number of epochs between members, and between burn-in and the first.
        num_members: The maximum number of members. Each chain has an equal share; older ones are
            dropped.
        chain_epochs: The number of epochs of a chain, including burn-in; None for one chain.
        optimize_epochs: The number of epochs at the start of a chain without noise.
        cycle_epochs: The number of epochs of a cycle after burn-in; None for constant steps.
        exploration: The share of a cycle without noise, at its start.
        make_net: Makes the initial network of a chain, from its number. Only chains need it.
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
        chain_epochs: int | None = None,
        optimize_epochs: int = 0,
        cycle_epochs: int | None = None,
        exploration: float = 0.8,
        make_net: Callable[[int], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(Ensemble(net, num_members), likelihood, **options)
        self.plan = SamplingPlan(
            burn_in=burn_in,
            collect_every=collect_every,
            num_members=num_members,
            chain_epochs=chain_epochs,
            optimize_epochs=optimize_epochs,
            cycle_epochs=cycle_epochs,
            exploration=exploration,
        )
        if cycle_epochs is not None and self.schedule != "constant":
            raise ArgumentError(
                f"schedule={self.schedule}: cycle_epochs sets the size of the steps; choose "
                "schedule=constant, or leave out cycle_epochs",
                *("schedule", "cycle_epochs"),
            )
        self.make_net = make_net
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

    def diagnostics(self, validation: Prediction) -> dict[str, float]:
        """Return R-hat and the effective sample size of the validation NLL of the members.

        Chains of which there are too few members are left out; without others, the result is empty.
        """
        targets, count = validation.targets, len(validation.samples)
        assert targets is not None
        planned = self.plan.collected(self.trainer.max_epochs or 0)
        epochs = [epoch for epoch in planned if epoch < self.current_epoch][-count:]
        if len(epochs) < count:  # there is no member yet
            return {}
        chains: dict[int, list[Tensor]] = {}
        for epoch, sample in zip(epochs, validation.samples.flip(0), strict=True):
            nll = self.likelihood.loss(sample.double(), targets)
            chains.setdefault(self.plan.chain(epoch), []).append(nll)
        long = [chain for chain in chains.values() if len(chain) >= FEWEST]
        if not long:
            return {}
        length = min(map(len, long))
        draws = torch.stack([torch.stack(chain[-length:]) for chain in long])
        found = {"rhat": split_rhat(draws), "ess": effective_sample_size(draws)}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def on_train_epoch_start(self) -> None:
        if self.plan.starts_chain(self.current_epoch):
            self._restart()
        self._set_step()
        super().on_train_epoch_start()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._set_step()

    def _restart(self) -> None:
        """Give the current network new initial weights, and the sampler an empty state."""
        assert self.make_net is not None
        net = self.make_net(self.plan.chain(self.current_epoch))
        self.net.current.load_state_dict(net.state_dict())
        (optimizer,) = self.trainer.optimizers
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["step"] = 0

    def _set_step(self) -> None:
        """Set the size and the noise of the sampler's next step."""
        (optimizer,) = self.trainer.optimizers
        for group in optimizer.param_groups:
            group["noise"] = self.plan.has_noise(self.epochs_done)
            if self.plan.cycle_epochs is not None:
                group["lr"] = optimizer.defaults["lr"] * self.plan.step_share(self.epochs_done)

    def seed_epoch(self) -> None:
        # The noise and the Gibbs draws of the sampler must be equal on all ranks.
        self.seed_draws(rank=0)

    def weighted(self, terms: Terms, num_rows: int) -> Tensor:
        """Weight the loss by the rows of a batch divided by the mean number per batch or step."""
        batches = int(self.trainer.num_training_batches)
        largest = self.epoch_terms.rows[0] if self.epoch_terms.rows else num_rows
        rows = min(math.ceil(self.num_train / self.trainer.world_size), batches * largest)
        # Lightning divides by accumulate_grad_batches, even if the last step has fewer batches.
        accumulated = self.trainer.accumulate_grad_batches * self.steps_per_epoch
        return super().weighted(terms, num_rows) * (num_rows * accumulated / rows)

    def optimizer_options(self, steps_per_epoch: int) -> dict[str, Any]:
        burn_in = self.plan.burn_in * steps_per_epoch
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
        self._check_chains()
        if not self.plan.collected(self.trainer.max_epochs or 0):
            log.warning(
                "the ensemble stays empty: its first member comes after epoch %d (burn_in + "
                "collect_every) and max_epochs is %d",
                self.plan.burn_in + self.plan.collect_every,
                self.trainer.max_epochs,
            )

    def _check_chains(self) -> None:
        """Refuse several chains that cannot be restarted."""
        if self.plan.chain_epochs is None:
            return
        if self.make_net is None:
            raise ArgumentError(
                f"chain_epochs={self.plan.chain_epochs}: each chain needs a network with new "
                "initial weights; pass make_net, or leave out chain_epochs",
                *("chain_epochs", "make_net"),
            )
        if self.make_net(0).state_dict().keys() != self.net.current.state_dict().keys():
            raise ArgumentError(
                f"chain_epochs={self.plan.chain_epochs}: chains of a network with fake "
                "quantization cannot start; train in float, and quantize the result",
                "chain_epochs",
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
                self.plan.burn_in,
            )


class CollectMembers(pl.Callback):
    """Add the network to the ensemble at the ends of the epochs of the plan."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SGHMCEnsemble)
        if trainer.current_epoch in pl_module.plan.collected(trainer.max_epochs or 0):
            pl_module.net.collect()
