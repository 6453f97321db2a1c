"""Method: the base class of all methods, with training and evaluation by Monte Carlo draws."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bqnn.arguments import ArgumentError, prefixed, whole_number
from bqnn.inference.calibration import Calibration
from bqnn.inference.early_stop import EarlyDraws
from bqnn.inference.likelihoods import Likelihood
from bqnn.inference.predict import (
    BATCH_SIZE,
    Bank,
    predictive_sets,
    predictive_until_settled,
)
from bqnn.inference.predictions import Prediction
from bqnn.layers.noise import reseed
from bqnn.layers.safe_convolutions import guard_backward
from bqnn.methods.epochs import is_last_epoch
from bqnn.methods.evaluation import Evaluation, log_in_fit
from bqnn.methods.schedules import SCHEDULES, with_schedule
from bqnn.methods.terms import CompiledTerms, EpochTerms, Terms
from bqnn.methods.watch import FiniteWatch
from bqnn.optim import make_optimizer
from bqnn.seeds import Stream, stream_seed

Batch = tuple[Tensor, Tensor]
Parameters = list[nn.Parameter] | list[dict[str, Any]]  # groups as in torch.optim


class Method(pl.LightningModule):
    """Base class for methods that learn a distribution over the weights of a network.

    Subclasses convert the network in `__init__`. They may override the loss (`loss_terms`), the
    optimizer, and the number of draws per evaluation. A method can be trained by any Lightning
    Trainer. Training stops at the first loss or gradient that is not finite.

    Args:
        net: The network.
        likelihood: The likelihood of the network's outputs.
        num_train: The number of training rows, N in the loss.
        seed: Seed of the training, which is reseeded at the start of each epoch, and of the draws
            in evaluation.
        optimizer: Name and options of the optimizer, for `make_optimizer`.
        schedule: Schedule of the learning rate: `cosine` lowers it after each epoch,
            `cosine_by_step` after each step, `constant` never.
        num_samples: The number of draws in a test, and in a validation outside of a training.
        val_samples: The number of draws in the validations of a training.

    Attributes:
        epoch_terms: The terms of the loss in the current epoch.
        recipe: The description from which a checkpoint's model is rebuilt; None if there is none.
        calibration: Calibrates the draws of predictions; None leaves them as they are.
        compiled_terms: Replaces `loss_terms` in training steps, see `CompileSteps`; None if steps
            are not compiled.

    Raises:
        ValueError: A number is out of range, or the schedule is unknown.
        TypeError: The conversion does not support the network.
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
        self.calibration: Calibration | None = None
        self.compiled_terms: CompiledTerms | None = None
        self.epoch_terms = EpochTerms()
        self._numbers: Mapping[str, Tensor] | None = None
        self._evaluation = Evaluation(likelihood)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets it before and after each hook, and nn.Module looks for parameters first.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Compute one draw of the output: logits [B, C], or mean and log variance [B, 2]."""
        out: Tensor = self.net(channels_last(x))
        return out

    def predictive(self, x: Tensor, num_samples: int | None = None) -> Tensor:
        """Stack independent draws of the output for normalized inputs: [S, B, num_outputs]."""
        (samples,) = self.predictive_sets([x], lambda rows: rows, num_samples)
        return samples

    def predictive_sets(
        self,
        sets: Sequence[Tensor],
        normalize: Callable[[Tensor], Tensor],
        num_samples: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        *,
        seed: int | None = None,
        batch_size: int = BATCH_SIZE,
        bank: Bank | None = None,
    ) -> list[Tensor]:
        """Predict several sets of inputs with the same draws of the network.

        Args:
            sets: Inputs [N_i, ...] that are not normalized yet.
            normalize: Normalizes a batch of inputs.
            num_samples: The number of draws S; the default is `available_samples`.
            progress: Called with the index of a set and of a draw, after each draw of a set.
            seed: The seed of the draws; None for that of the training.
            batch_size: The number of rows in a forward pass.
            bank: Draws of the weights that were made before; None to make them.

        Returns:
            Draws of the output [S, N_i, num_outputs] for each set, on the device of the network.
        """
        draws = predictive_sets(
            self.net,
            sets,
            self.available_samples if num_samples is None else num_samples,
            prepare=lambda rows: channels_last(normalize(rows)),
            seed=self.seed if seed is None else seed,
            batch_size=batch_size,
            bank=bank,
            progress=progress,
        )
        return draws if self.calibration is None else [self.calibration(each) for each in draws]

    def predictive_until_settled(
        self,
        sets: Sequence[Tensor],
        normalize: Callable[[Tensor], Tensor],
        max_samples: int,
        tolerance: float,
        progress: Callable[[int, int], None] | None = None,
        *,
        seed: int | None = None,
        batch_size: int = BATCH_SIZE,
        bank: Bank | None = None,
    ) -> list[EarlyDraws]:
        """Predict several sets of inputs; rows whose prediction has settled make no more draws.

        Args:
            sets: Inputs [N_i, ...] that are not normalized yet.
            normalize: Normalizes a batch of inputs.
            max_samples: The largest number of draws S of a row.
            tolerance: See `Likelihood.is_settled`.
            progress: Called with the index of a set and of a draw.
            seed: The seed of the draws; None for that of the training.
            batch_size: The number of rows in a forward pass.
            bank: Draws of the weights that were made before; None to make them.
        """
        calibration = self.calibration

        def is_settled(draws: Tensor) -> Tensor:
            draws = draws if calibration is None else calibration(draws)
            return self.likelihood.is_settled(draws, tolerance)

        found = predictive_until_settled(
            self.net,
            sets,
            max_samples,
            is_settled,
            prepare=lambda rows: channels_last(normalize(rows)),
            seed=self.seed if seed is None else seed,
            batch_size=batch_size,
            bank=bank,
            progress=progress,
        )
        if calibration is None:
            return found
        return [each._replace(samples=calibration.by_count(*each)) for each in found]

    @property
    def available_samples(self) -> int:
        """The number of draws in an evaluation."""
        return self.num_samples

    def check_samples(self, num_samples: int | None) -> int:
        """Return the number of draws in an evaluation.

        Args:
            num_samples: The requested number; None for the default of the method.

        Raises:
            ValueError: The method cannot make that many different draws.
        """
        return self.available_samples if num_samples is None else num_samples

    def diagnostics(self, validation: Prediction) -> dict[str, float]:
        """Return metrics of the training itself, such as the convergence of a sampler.

        Args:
            validation: The predictions of all draws for the validation rows.
        """
        return {}

    def loss_terms(self, inputs: Tensor, targets: Tensor) -> Terms:
        """Return the loss of a training batch as `loss`, and its terms by name.

        It must be the same computation for each batch of an epoch, apart from numbers that it gets
        from `step_number`.
        """
        nll = self.likelihood.loss(self(inputs), targets)
        return {"loss": nll, "nll": nll}

    def step_numbers(self) -> dict[str, float]:
        """Return the numbers in the loss that change from step to step, by name."""
        return {}

    def step_number(self, name: str) -> float | Tensor:
        """Return a number of `step_numbers`; in a CUDA graph the tensor that holds it."""
        return self.step_numbers()[name] if self._numbers is None else self._numbers[name]

    @contextmanager
    def numbers_given(self, numbers: Mapping[str, Tensor]) -> Iterator[None]:
        """Let `step_number` return tensors in the body, which a CUDA graph can read anew."""
        self._numbers = numbers
        try:
            yield
        finally:
            self._numbers = None

    def trained_networks(self) -> list[nn.Module]:
        """Return the networks whose forward passes are parts of a training step."""
        return [self.net]

    def fine_tuning(self, optimizer: dict[str, Any], prior_weight: float) -> "Method":
        """Return a method that continues to train the trained network.

        The learning rate falls to 0 along a cosine, step by step, because a fine-tuning can be
        as short as one epoch.

        Args:
            optimizer: Name and options of the optimizer, for `make_optimizer`. Without
                `weight_decay`, the weight decay of the training applies, times `prior_weight`.
            prior_weight: Factor of the prior's part of the loss.

        Returns:
            This method, modified, or a different method with the same network.
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
        steps = int(self.trainer.estimated_stepping_batches)  # also creates the data loaders
        options = self.optimizer_options(self.steps_per_epoch)
        with prefixed("optimizer"):
            optimizer = make_optimizer(self.trained_parameters(), **options)
        epochs = min(epochs, math.ceil(steps / self.steps_per_epoch))  # max_steps may end it first
        return self.scheduled(optimizer, epochs, steps)

    def scheduled(self, optimizer: Optimizer, epochs: int, steps: int) -> Any:
        """Combine the optimizer with the schedule, see `with_schedule`."""
        return with_schedule(optimizer, self.schedule, epochs=epochs, steps=steps)

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps per epoch; the last one may accumulate fewer batches."""
        batches = int(self.trainer.num_training_batches)
        return max(1, math.ceil(batches / self.trainer.accumulate_grad_batches))

    @property
    def epochs_done(self) -> float:
        """The number of epochs trained so far, with the fraction of the current epoch."""
        batches = int(self.trainer.num_training_batches)
        return self.current_epoch + len(self.epoch_terms.rows) / batches

    def optimizer_options(self, steps_per_epoch: int) -> dict[str, Any]:
        """Return the arguments of `make_optimizer`."""
        return self.optimizer

    def trained_parameters(self) -> Parameters:
        """Return the parameters that the optimizer updates, or groups of them."""
        return [param for param in self.parameters() if param.requires_grad]

    def is_logged_epoch(self) -> bool:
        """Return whether this epoch is logged: with each validation, and at the end."""
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
        self.train()  # a loaded model is in eval mode, which Lightning does not change

    def on_train_epoch_start(self) -> None:
        self.seed_epoch()
        # Lightning sets the rate of the next epoch before the metrics of this epoch are logged.
        self._epoch_lr = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        self.epoch_terms.clear()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        inputs, targets = batch
        compute = self.loss_terms if self.compiled_terms is None else self.compiled_terms
        terms = compute(inputs, targets)
        self.epoch_terms.record(terms, len(targets))
        return self.weighted(terms, len(targets))

    def weighted(self, terms: Terms, num_rows: int) -> Tensor:
        """Return the loss of a batch, weighted by its number of rows if the method does so."""
        loss = terms["loss"]
        assert isinstance(loss, Tensor)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        given = None if self.compiled_terms is None else self.compiled_terms.gradients
        if given is None:
            super().backward(loss, *args, **kwargs)
            return
        for param, gradient in given:
            param.grad = gradient

    def seed_epoch(self) -> None:
        """Seed the draws of this epoch by (seed, epoch, rank), so that a resumed run repeats them.

        Each rank has its own draws for its own rows.
        """
        self.seed_draws(self.global_rank)

    def seed_draws(self, rank: int) -> None:
        """Seed the draws of this epoch as on the given rank."""
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
        log_in_fit(self, {**terms, "train/lr": self._epoch_lr}, torch.float32)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        fitting = self.trainer.state.fn == "fit"
        available = self.available_samples
        self._evaluate(batch, min(self.val_samples, available) if fitting else available)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.available_samples)

    def on_validation_epoch_end(self) -> None:
        self._evaluation.finish("val", self)

    def on_test_epoch_end(self) -> None:
        self._evaluation.finish("test", self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.recipe

    def _evaluate(self, batch: Batch, num_samples: int) -> None:
        inputs, targets = batch
        self._evaluation.record(self.predictive(inputs, num_samples), targets)


def channels_last(x: Tensor) -> Tensor:
    """Convert images to the fastest layout for convolutions; return other inputs unchanged."""
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
