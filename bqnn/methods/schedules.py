"""Learning rate schedules."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

SCHEDULES = ("cosine", "cosine_by_step", "constant")


def with_schedule(optimizer: Optimizer, schedule: str, *, epochs: int, steps: int) -> Any:
    """Combine an optimizer with a schedule, for `LightningModule.configure_optimizers`.

    Args:
        optimizer: The optimizer.
        schedule: `cosine` lowers the learning rate to 0 after each epoch, `cosine_by_step` after
            each step; `constant` never changes it.
        epochs: The number of epochs of the training.
        steps: The number of optimizer steps of the training.

    Returns:
        The optimizer, or a dictionary with the keys `optimizer` and `lr_scheduler`.
    """
    if schedule == "constant":
        return optimizer
    by_step = schedule == "cosine_by_step"
    annealing = CosineAnnealingLR(optimizer, T_max=steps if by_step else epochs)
    interval = "step" if by_step else "epoch"
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": annealing, "interval": interval},
    }
