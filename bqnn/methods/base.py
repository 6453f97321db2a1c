"""What every method shares: the training step, evaluation by Monte-Carlo draws, logging."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from bqnn.arguments import ArgumentError, prefixed, whole_number
from bqnn.inference.likelihoods import Likelihood
from bqnn.inference.metrics import MixtureMetrics, NotFiniteError
from bqnn.inference.predict import predictive_sets
from bqnn.inference.predictions import Prediction, score
from bqnn.layers.noise import reseed
from bqnn.layers.safe_convolutions import guard_backward
from bqnn.methods.epochs import is_last_epoch
from bqnn.methods.terms import EpochTerms, Terms
from bqnn.methods.watch import FiniteWatch
from bqnn.optim import make_optimizer
from bqnn.seeds import Stream, stream_seed

Batch = tuple[Tensor, Tensor]
SCHEDULES = ("cosine", "cosine_by_step", "constant")


class Method(pl.LightningModule):
    """A way to learn a distribution over the weights of a network.

    Subclasses convert the network in `__init__` and may change the loss (`loss_terms`), the
    optimizer and the number of draws that an evaluation makes. A method trains in any Lightning
    Trainer; the run stops at the first loss or gradient that is not finite.

    Args:
        net: The network.
        likelihood: What the network's outputs mean.
        num_train: Rows in the training set, the N of the loss.
        seed: Training is reseeded from it at the start of each epoch, and evaluation makes its
            draws from it.
        optimizer: Name and options of the optimizer, for `make_optimizer`.
        schedule: Of the learning rate: `cosine` lowers it at the end of each epoch,
            `cosine_by_step` after each step, `constant` never.
        num_samples: Draws in a test, and in a validation outside of a training.
        val_samples: Draws in the validations of a training.

    Attributes:
        epoch_terms: The terms of the loss in the current epoch.
        recipe: What checkpoints say of the method, so that it can be built from them.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        *,
        num_train: int,
        seed: int,
        optimizer: dict[str, Any],
        schedule: str = "cosine",
        num_samples: int = 20,
        val_samples: int = 4,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ArgumentError(f"schedule={schedule!r}: choose {', '.join(SCHEDULES)}", "schedule")
        guard_backward()
        self.net = net.to(memory_format=torch.channels_last)
        self.likelihood = likelihood
        self.num_train = whole_number("num_train", num_train, "rows to train on, 1 or more", 1)
        self.seed = whole_number("seed", seed, "choose 0 or more", 0)
        self.optimizer = optimizer
        self.schedule = schedule
        reason = "at least one draw is needed"
        self.num_samples = whole_number("num_samples", num_samples, reason, 1)
        self.val_samples = whole_number("val_samples", val_samples, reason, 1)
        self.stream = Stream.TRAINING
        self.recipe: dict[str, Any] | None = None
        self.epoch_terms = EpochTerms()
        self._predictions: list[Prediction] = []  # of the batches that are being evaluated

    def forward(self, x: Tensor) -> Tensor:
        """One draw of the network's output: logits [B, C], or mean and log variance [B, 2]."""
        out: Tensor = self.net(channels_last(x))
        return out

    def predictive(self, x: Tensor, num_samples: int | None = None) -> Tensor:
        """Stack independent draws of the output for normalized inputs: [S, B, ...]."""
        (samples,) = self.predictive_sets([x], lambda rows: rows, num_samples)
        return samples

    def predictive_sets(
        self,
        sets: Sequence[Tensor],
        normalize: Callable[[Tensor], Tensor],
        num_samples: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Tensor]:
        """The same for many sets of inputs that are not normalized yet, from one set of draws."""
        return predictive_sets(
            self.net,
            sets,
            self.available_samples if num_samples is None else num_samples,
            prepare=lambda rows: channels_last(normalize(rows)),
            seed=self.seed,
            progress=progress,
        )

    @property
    def available_samples(self) -> int:
        """How many draws an evaluation makes."""
        return self.num_samples

    def check_samples(self, num_samples: int | None) -> int:
        """The number of draws to make where this many are asked for, None for the method's own."""
        return self.available_samples if num_samples is None else num_samples

    def loss_terms(self, inputs: Tensor, targets: Tensor) -> Terms:
        """The loss of a training batch under `loss`, and the terms it is made of."""
        nll = self.likelihood.loss(self(inputs), targets)
        return {"loss": nll, "nll": nll}

    def fine_tuning(self, optimizer: dict[str, Any], prior_weight: float) -> "Method":
        """A method that trains the trained network a little further.

        The learning rate falls to 0 along a cosine, step by step: a fine-tuning may be one epoch
        long.

        Args:
            optimizer: The optimizer to train with, for `make_optimizer`. Weight decay stays as it
                was, apart from `prior_weight`, where these options name none.
            prior_weight: Factor of the part of the loss that comes from the prior.

        Returns:
            This method, changed, or another one of the same network.
        """
        if "weight_decay" in self.optimizer:
            decay = prior_weight * self.optimizer["weight_decay"]
            optimizer = {"weight_decay": decay, **optimizer}
        self.optimizer = optimizer
        self.stream = Stream.FINE_TUNING
        self.schedule = "cosine_by_step"
        return self

    def configure_callbacks(self) -> list[pl.Callback]:
        return [FiniteWatch(self.epoch_terms)]

    def configure_optimizers(self) -> Any:
        epochs = self.trainer.max_epochs
        assert epochs is not None
        if epochs < 1:
            raise ArgumentError(
                f"max_epochs={epochs}: train for a number of epochs, 1 or more", "max_epochs"
            )
        steps = int(self.trainer.estimated_stepping_batches)  # this loads the data, too
        options = self.optimizer_options(self.steps_per_epoch)
        with prefixed("optimizer"):
            optimizer = make_optimizer(self.trained_parameters(), **options)
        if self.schedule == "constant":
            return optimizer
        by_step = self.schedule == "cosine_by_step"
        epochs = min(epochs, math.ceil(steps / self.steps_per_epoch))  # max_steps may end it first
        schedule = CosineAnnealingLR(optimizer, T_max=steps if by_step else epochs)
        interval = "step" if by_step else "epoch"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": interval},
        }

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the optimizer in an epoch; of accumulated batches the last may be fewer."""
        batches = int(self.trainer.num_training_batches)
        return max(1, math.ceil(batches / self.trainer.accumulate_grad_batches))

    @property
    def epochs_done(self) -> float:
        """Epochs trained so far, the part of the current one included."""
        batches = int(self.trainer.num_training_batches)
        return self.current_epoch + len(self.epoch_terms.rows) / batches

    def optimizer_options(self, steps_per_epoch: int) -> dict[str, Any]:
        """What `make_optimizer` is called with."""
        return self.optimizer

    def trained_parameters(self) -> list[nn.Parameter]:
        return [param for param in self.parameters() if param.requires_grad]

    def is_logged_epoch(self) -> bool:
        """Whether this epoch's training terms are logged: with each validation, and at the end."""
        every = self.trainer.check_val_every_n_epoch
        is_due = every is None or (self.current_epoch + 1) % every == 0
        return is_due or is_last_epoch(self.trainer)

    def on_fit_start(self) -> None:
        overfit = self.trainer.overfit_batches  # type: ignore[attr-defined]
        if overfit:
            raise ArgumentError(
                f"overfit_batches={overfit}: the loss is that of all training rows, and a few of "
                "them have another posterior; choose limit_train_batches",
                *("overfit_batches", "limit_train_batches"),
            )
        self.train()  # a loaded model is in eval mode, and Lightning would leave it there

    def on_train_epoch_start(self) -> None:
        self.seed_epoch()
        # Lightning sets the next epoch's rate before this one's metrics are logged.
        self._epoch_lr = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        self.epoch_terms.clear()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        inputs, targets = batch
        terms = self.loss_terms(inputs, targets)
        self.epoch_terms.record(terms, len(targets))
        loss = terms["loss"]
        assert isinstance(loss, Tensor)
        return loss

    def seed_epoch(self) -> None:
        """Start this epoch's draws from (seed, epoch), so that a resumed run repeats them.

        Of several ranks, each has draws of its own for its own rows.
        """
        self.seed_draws(self.global_rank)

    def seed_draws(self, rank: int) -> None:
        """Start this epoch's draws as a rank has them."""
        seed = stream_seed(self.seed, self.stream, self.current_epoch, rank)
        reseed(self.device, seed)

    def on_train_epoch_end(self) -> None:
        if not self.is_logged_epoch():
            return
        means = self.epoch_terms.means()
        if self.trainer.world_size > 1:
            means = self.trainer.strategy.reduce(means.to(self.device))
        names = [f"train/{name}" for name in self.epoch_terms.names]
        terms = dict(zip(names, means.tolist(), strict=True))
        self._log_in_fit({**terms, "train/lr": self._epoch_lr}, torch.float32)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        fitting = self.trainer.state.fn == "fit"
        available = self.available_samples
        self._predict(batch, min(self.val_samples, available) if fitting else available)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._predict(batch, self.available_samples)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.recipe

    def _predict(self, batch: Batch, num_samples: int) -> None:
        inputs, targets = batch
        samples = self.predictive(inputs, num_samples)
        self._predictions.append(Prediction(self.likelihood, samples.cpu(), targets.cpu()))

    @cached_property  # which is no submodule: float64 sums stay on the CPU, as the samples do
    def _metrics(self) -> MixtureMetrics:
        return self.likelihood.metrics(sync_on_compute=False)

    def _log_metrics(self, split: str) -> None:
        predictions, self._predictions = self._predictions, []
        try:
            metrics = score(*predictions, metrics=self._metrics)
        except NotFiniteError as error:
            raise NotFiniteError(f"{split}/{error}", _prefixed(split, error.metrics)) from None
        named = _prefixed(split, metrics)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._log_in_fit(named, torch.float64)
        else:
            # Of plain numbers Lightning makes float32, and it weighs by the rows of the batch.
            self.log_dict(_tensors(named, torch.float64), batch_size=1)

    def _log_in_fit(self, values: dict[str, float], dtype: torch.dtype) -> None:
        """What `self.log` does for values that need no averaging.

        dtype: what callbacks get; loggers get the numbers as they are.

        It keeps a metric for each, which on a small table took an eighth of the time. Lightning's
        LearningRateMonitor goes this way, too.
        """
        tensors = _tensors(values, dtype)
        self.trainer.callback_metrics.update(tensors)
        self.trainer.logged_metrics.update(tensors)
        for logger in self.loggers:
            # The step that Lightning gives to what an epoch logs.
            logger.log_metrics({"epoch": self.current_epoch, **values}, step=self.global_step - 1)
            logger.save()


def _prefixed(split: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in metrics.items()}


def _tensors(values: Mapping[str, float], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}


def channels_last(x: Tensor) -> Tensor:
    """Pictures in the layout that convolutions are fastest in; anything else as it is."""
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
