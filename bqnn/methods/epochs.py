"""Detection of the last epoch of a training."""

import pytorch_lightning as pl


def is_last_epoch(trainer: pl.Trainer) -> bool:
    """Return whether the current epoch is the last one. Call it after the last step of an epoch.

    A training ends at `max_epochs`, at `max_steps`, or after `should_stop` is set, by `max_time` or
    early stopping.

    Examples:
        >>> trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False)
        >>> is_last_epoch(trainer)
        True
    """
    # If min_epochs overrides should_stop, this is also true for earlier epochs.
    return bool(
        trainer.should_stop
        or _is_reached(trainer.current_epoch + 1, trainer.max_epochs)
        or _is_reached(trainer.global_step, trainer.max_steps)
    )


def _is_reached(count: int, limit: int | None) -> bool:
    return limit is not None and 0 <= limit <= count  # -1 means no limit
