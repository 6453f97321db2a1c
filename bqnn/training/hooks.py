"""Make Lightning's calls of hooks cheap, which take longer than a step of a small network."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import pytorch_lightning as pl
from pytorch_lightning.profilers import PassThroughProfiler

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


def skip_idle_hooks(callbacks: Iterable[pl.Callback]) -> None:
    """Keep Lightning from calling hooks of steps and epochs that callbacks do not implement.

    Args:
        callbacks: The callbacks of a Trainer, which are changed.

    Examples:
        >>> callback = pl.Callback()
        >>> skip_idle_hooks([callback])
        >>> callback.on_train_batch_start is None
        True
    """
    for callback in callbacks:
        for name in HOOKS:
            if getattr(type(callback), name) is getattr(pl.Callback, name):
                setattr(callback, name, None)
