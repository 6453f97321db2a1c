"""FiniteWatch: stop a training at the first loss or gradient that is not finite."""

import math
from bisect import bisect_right

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from bqnn.arguments import NamesArguments
from bqnn.methods.terms import EpochTerms

CHECK_EVERY = 50  # steps, on a GPU


class DivergedError(NamesArguments, FloatingPointError):
    """A loss or a gradient is not finite."""


class FiniteWatch(pl.Callback):
    """Raises a `DivergedError` if a loss or a gradient is not finite.

    The check synchronizes the device. On the CPU, where that is free, it runs before each step of
    the optimizer; on a GPU before every 50th, before each validation and at the end of each epoch.

    Args:
        terms: The record of the losses, which the trained module updates with each batch.
    """

    def __init__(self, terms: EpochTerms) -> None:
        self.terms = terms
        self._first_step = 0
        self._norms: list[Tensor] = []  # per step of this epoch: the norm of each gradient
        self._step_ends: list[int] = []  # per step: the number of batches so far
        self._num_checked = 0  # steps

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = trainer.global_step
        self._norms.clear()
        self._step_ends.clear()
        self._num_checked = 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # Gradients are averaged over ranks here, so that an error on one rank stops all ranks.
        gradients = [param.grad for param in _with_gradient(optimizer)]
        self._norms.append(torch.stack(torch._foreach_norm(gradients)).detach())  # type: ignore[arg-type]
        self._step_ends.append(len(self.terms.rows))
        if pl_module.device.type == "cpu" or len(self._norms) % CHECK_EVERY == 0:
            self._check(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer, pl_module)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the steps since the last check."""
        first, self._num_checked = self._num_checked, len(self._norms)
        first_batch = self._step_ends[first - 1] if first else 0
        new = self._norms[first:] + [loss.reshape(1) for loss in self.terms.losses[first_batch:]]
        if new and not all(map(math.isfinite, torch.cat(new).tolist())):
            self._stop(trainer, pl_module)

    def _stop(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise the error of the first invalid step."""
        bad_steps = [step for step, norm in enumerate(self._norms) if not norm.isfinite().all()]
        losses = self.terms.losses
        bad_batches = [batch for batch, loss in enumerate(losses) if not loss.isfinite()]
        steps = [bisect_right(self._step_ends, batch) for batch in bad_batches]
        if min(steps, default=math.inf) <= min(bad_steps, default=math.inf):
            raise self._loss_error(pl_module, steps[0], bad_batches[0])
        raise self._gradient_error(trainer.optimizers[0], pl_module, bad_steps[0])

    def _loss_error(self, module: pl.LightningModule, step: int, batch: int) -> DivergedError:
        spoilt = [n for n, param in module.named_parameters() if not param.isfinite().all()]
        # The parameters of earlier steps are no longer known.
        seen = f"; {spoilt[0]} is not finite" if spoilt and step + 1 >= len(self._norms) else ""
        return DivergedError(
            f"the loss is {self.terms.losses[batch].item()} {self._place(module, step, batch)}; "
            "likely causes: optimizer.lr is too high, or inputs are far outside the range of the "
            f"others{seen}",
            "optimizer.lr",
        )

    def _gradient_error(
        self, optimizer: Optimizer, module: pl.LightningModule, step: int
    ) -> DivergedError:
        norms, batch = self._norms[step], self._step_ends[step] - 1
        first = int((~norms.isfinite()).nonzero()[0])
        param = _with_gradient(optimizer)[first]
        name = next(name for name, own in module.named_parameters() if own is param)
        cause = (
            "a standard deviation left the range of floats: see init_rho, prior_std"
            if name.endswith(".rho")
            else "a predicted variance or probability has become 0, as for targets without noise"
        )
        return DivergedError(
            f"the gradient of {name} has a norm of {norms[first].item()} while the loss is "
            f"{self.terms.losses[batch].item():.4g}, {self._place(module, step, batch)}; "
            f"likely causes: optimizer.lr is too high, or {cause}",
            *("optimizer.lr", "init_rho", "prior_std"),
        )

    def _place(self, module: pl.LightningModule, step: int, batch: int) -> str:
        epoch = module.current_epoch
        return f"at step {self._first_step + step} (epoch {epoch}, batch {batch})"


def _with_gradient(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that a step updates."""
    groups = optimizer.param_groups
    return [param for group in groups for param in group["params"] if param.grad is not None]
