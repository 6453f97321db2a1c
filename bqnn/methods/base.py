"""What every method shares: the training step, evaluation by Monte-Carlo draws, logging."""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from bqnn.inference.likelihoods import Likelihood
from bqnn.inference.metrics import MixtureMetrics, NotFiniteError
from bqnn.inference.predict import predictive_sets
from bqnn.inference.predictions import Prediction, score
from bqnn.layers.noise import reseed
from bqnn.layers.safe_convolutions import SafeConvolutions, has_narrow_kernels
from bqnn.methods.epochs import is_last_epoch
from bqnn.optim import make_optimizer
from bqnn.seeds import Stream, stream_seed

Batch = tuple[Tensor, Tensor]
SCHEDULES = ("cosine", "cosine_by_step", "constant")  # cosine lowers the rate at epoch ends
Terms = dict[str, Tensor | float]


class Method(pl.LightningModule):
    """A way to learn a distribution over the weights of `net`.

    Subclasses convert the network in `__init__` and may change the loss (`loss_terms`), the
    optimizer and how many draws there are to evaluate with.

    num_samples: draws in test and in the final validation; val_samples: draws in the validations
    while it trains, which only draw curves. num_train: rows in the training set, the N of the
    loss. seed: training is reseeded from it at the start of each epoch, and evaluation makes
    its draws from it.
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
        if min(num_samples, val_samples) < 1:
            raise ValueError(
                f"method.num_samples={num_samples}, method.val_samples={val_samples}: "
                "at least one draw is needed"
            )
        if schedule not in SCHEDULES:
            raise ValueError(f"method.schedule={schedule!r}: choose {', '.join(SCHEDULES)}")
        self.net = net.to(memory_format=torch.channels_last)
        self._is_narrow = has_narrow_kernels(net)
        self.likelihood = likelihood
        self.num_train = num_train
        self.seed = seed
        self.optimizer = optimizer
        self.schedule = schedule
        self.num_samples = num_samples
        self.val_samples = val_samples
        self.stream = Stream.TRAINING
        self.recipe: dict[str, Any] | None = None
        self._epoch_terms: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._epoch_norms: list[Tensor] = []  # of each parameter's gradient
        self._num_checked = 0  # of these
        self._epoch_rows: list[int] = []  # of each batch
        self._step_ends: list[int] = []  # batches of this epoch up to each step, its own included
        self._predictions: list[Prediction] = []  # of the batches that are being evaluated

    def forward(self, x: Tensor) -> Tensor:
        """One draw of the network's output: logits [B, C], or mean and log variance [B, 2]."""
        with SafeConvolutions() if self._is_narrow else nullcontext():
            return self.net(channels_last(x))

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

    def initialize(self) -> None:
        """Take what training is to start from, where that is not the network as it was built.

        To be called before a Trainer sees the model (its callbacks may change the network), and
        not for a run that is resumed.
        """

    def fine_tune(self, optimizer: dict[str, Any], prior_weight: float) -> None:
        """Train the trained network a little further: another optimizer, down to a rate of 0.

        prior_weight scales the part of the loss that comes from the prior; weight decay stays as
        it was where the optimizer's options name none.
        """
        if "weight_decay" in self.optimizer:
            decay = prior_weight * self.optimizer["weight_decay"]
            optimizer = {"weight_decay": decay, **optimizer}
        self.optimizer = optimizer
        self.stream = Stream.FINE_TUNING
        self.schedule = "cosine_by_step"  # a fine-tuning may be one epoch long

    def configure_optimizers(self) -> Any:
        epochs = self.trainer.max_epochs
        assert epochs is not None
        if epochs < 1:
            raise ValueError(f"max_epochs={epochs}: train for a number of epochs, 1 or more")
        steps = int(self.trainer.estimated_stepping_batches)  # this loads the data, too
        options = self.optimizer_options(self.steps_per_epoch)
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
        return self.current_epoch + len(self._epoch_rows) / int(self.trainer.num_training_batches)

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
            raise ValueError(
                f"trainer.overfit_batches={overfit}: the loss is that of all training rows, "
                "and a few of them have another posterior; choose trainer.limit_train_batches"
            )
        self.train()  # a loaded model is in eval mode, and Lightning would leave it there

    def on_train_epoch_start(self) -> None:
        self.seed_epoch()
        # Lightning sets the next epoch's rate before this one's metrics are logged.
        self._epoch_lr = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        self._first_step = self.global_step
        self._epoch_terms.clear()
        self._epoch_norms.clear()
        self._num_checked = 0
        self._epoch_rows.clear()
        self._step_ends.clear()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        inputs, targets = batch
        terms = self.loss_terms(inputs, targets)
        self._record(terms, len(targets))
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

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Here gradients are those of all ranks: what is wrong on one stops all of them.
        gradients: Any = [param.grad for param in _with_gradient(optimizer)]
        self._epoch_norms.append(torch.stack(torch._foreach_norm(gradients)).detach())
        self._step_ends.append(len(self._epoch_rows))
        # Looking waits for the device, which costs nothing on the CPU.
        if self.device.type == "cpu" or len(self._epoch_norms) % 50 == 0:
            self._refuse_non_finite()

    def on_train_epoch_end(self) -> None:
        self._refuse_non_finite()
        if not self.is_logged_epoch():
            return
        rows = torch.tensor(self._epoch_rows, dtype=torch.float64)
        values = [torch.stack(term).cpu().double() for term in self._epoch_terms.values()]
        means = torch.stack(values) @ rows / rows.sum()
        if self.trainer.world_size > 1:
            means = self.trainer.strategy.reduce(means.to(self.device))
        names = [f"train/{name}" for name in self._epoch_terms]
        terms = dict(zip(names, means.tolist(), strict=True))
        self._log_in_fit({**terms, "train/lr": self._epoch_lr}, torch.float32)

    def on_validation_epoch_start(self) -> None:
        self._refuse_non_finite()

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

    def _record(self, terms: Terms, num_rows: int) -> None:
        """Keep the terms of a training batch for the epoch's means."""
        for name, value in terms.items():
            self._epoch_terms[name].append(torch.as_tensor(value).detach())
        self._epoch_rows.append(num_rows)

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

    def _refuse_non_finite(self) -> None:
        """FloatingPointError where a loss or a gradient of this epoch is not finite."""
        first_new, self._num_checked = self._num_checked, len(self._epoch_norms)
        losses, norms = self._epoch_terms["loss"], self._epoch_norms
        new = norms[first_new:]
        new += [
            loss.reshape(1) for loss in losses[self._step_ends[first_new - 1] if first_new else 0 :]
        ]
        if not new or all(map(math.isfinite, torch.cat(new).tolist())):
            return
        bad_steps = [step for step, norm in enumerate(norms) if not norm.isfinite().all()]
        bad_batches = [batch for batch, loss in enumerate(losses) if not loss.isfinite()]
        steps = [bisect_right(self._step_ends, batch) for batch in bad_batches]
        is_loss = min(steps, default=math.inf) <= min(bad_steps, default=math.inf)
        step = steps[0] if is_loss else bad_steps[0]
        batch = bad_batches[0] if is_loss else self._step_ends[step] - 1
        where = (
            f"at step {self._first_step + step} (epoch {self.current_epoch}, batch {batch}); "
            "likely causes: method.optimizer.lr is too high, or "
        )
        if is_loss:
            spoilt = [n for n, param in self.named_parameters() if not param.isfinite().all()]
            # Of earlier steps one no longer knows.
            seen = f"; {spoilt[0]} is not finite" if spoilt and step + 1 >= len(norms) else ""
            raise FloatingPointError(
                f"the loss is {losses[batch].item()} {where}inputs are far outside the range of "
                f"the others{seen}"
            )
        optimizer = self.optimizers()
        assert isinstance(optimizer, Optimizer | LightningOptimizer)
        first = int((~norms[step].isfinite()).nonzero()[0])
        param = _with_gradient(optimizer)[first]
        name = next(name for name, own in self.named_parameters() if own is param)
        cause = (
            "a standard deviation left the range of floats: see method.init_rho, method.prior_std"
            if name.endswith(".rho")
            else "a predicted variance or probability has become 0, as for targets without noise"
        )
        raise FloatingPointError(
            f"the gradient of {name} has a norm of {norms[step][first].item()} while the loss is "
            f"{losses[batch].item():.4g}, {where}{cause}"
        )


def _with_gradient(optimizer: Optimizer | LightningOptimizer) -> list[Tensor]:
    groups = optimizer.param_groups
    return [param for group in groups for param in group["params"] if param.grad is not None]


def _prefixed(split: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in metrics.items()}


def _tensors(values: Mapping[str, float], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}


def channels_last(x: Tensor) -> Tensor:
    """Pictures in the layout that convolutions are fastest in; anything else as it is."""
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
