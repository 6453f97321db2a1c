"""Make Lightning's calls of hooks cheap, which take longer than a step of a small network."""

from contextlib import AbstractContextManager, nullcontext

import pytorch_lightning as pl
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.trainer.states import RunningStage
from torch.optim import Optimizer

# The hooks of each step and epoch. Lightning calls them in one place, which skips None.
HOOKS = (
    *("on_train_epoch_start", "on_train_epoch_end"),
    *("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step"),
)


class NoProfiler(PassThroughProfiler):
    """Lightning's default profiler, without a generator for each call of a hook."""

    _idle = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return self._idle


class Trainer(pl.Trainer):
    """Lightning's Trainer with a faster look at its stage, which each step takes about 20 times."""

    @property
    def training(self) -> bool:
        return self.state.stage is RunningStage.TRAINING

    @training.setter
    def training(self, value: bool) -> None:
        pl.Trainer.training.fset(self, value)  # type: ignore[attr-defined]


class SkipIdleHooks(pl.Callback):
    """Keep Lightning from calling hooks of steps and epochs that do nothing.

    They are None on the module, as long as it is trained, and on the callbacks of the Trainer.

    Examples:
        >>> trainer = pl.Trainer(callbacks=[SkipIdleHooks()], logger=False, accelerator="cpu")
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            _skip(callback, pl.Callback, HOOKS)
        _skip(pl_module, pl.LightningModule, HOOKS)
        if trainer.gradient_clip_val is None:
            _skip(pl_module, pl.LightningModule, ("configure_gradient_clipping",))
        if _is_idle(pl_module, pl.LightningModule, "optimizer_zero_grad"):
            vars(pl_module)["optimizer_zero_grad"] = _drop_gradients

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for name in (*HOOKS, "configure_gradient_clipping"):
            if vars(pl_module).get(name, False) is None:
                delattr(pl_module, name)
        if vars(pl_module).get("optimizer_zero_grad") is _drop_gradients:
            del pl_module.optimizer_zero_grad

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")


def _skip(instance: object, base: type, names: tuple[str, ...]) -> None:
    for name in names:
        if _is_idle(instance, base, name):
            vars(instance)[name] = None


def _is_idle(instance: object, base: type, name: str) -> bool:
    return name not in vars(instance) and getattr(type(instance), name) is getattr(base, name)


def _drop_gradients(epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
    """Do what `optimizer.zero_grad()` does, without its records for a profiler."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = None
