"""Which epoch of a training is its last one, for whichever reason the training ends."""

import pytorch_lightning as pl


def is_last_epoch(trainer: pl.Trainer) -> bool:
    """Whether the current epoch is the last one; to be asked when all its steps are done.

    A training ends at `max_epochs`, at `max_steps`, or where something sets `should_stop`: the
    clock of `max_time`, or early stopping.

    Example:
        >>> trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False)
        >>> is_last_epoch(trainer)
        True
    """
    # Where min_epochs goes against should_stop, an epoch too many is taken for the last one.
    return bool(
        trainer.should_stop
        or _is_reached(trainer.current_epoch + 1, trainer.max_epochs)
        or _is_reached(trainer.global_step, trainer.max_steps)
    )


def _is_reached(count: int, limit: int | None) -> bool:
    return limit is not None and 0 <= limit <= count  # -1 is no limit
