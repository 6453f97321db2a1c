"""Refuse training batches in which batch norm would get one value per channel."""

import math

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from bqnn.data import TensorData
from bqnn.methods import Method


def refuse_single_values(trainer: pl.Trainer, model: Method, data: TensorData) -> None:
    """Refuse a batch of one row if a batch norm would get one value per channel from it.

    One value has no variance, so batch norm fails in training mode.

    Args:
        trainer: The Trainer. Its number of ranks and `limit_train_batches` determine the batches.
        model: The model. It predicts one row, and stays as it is.
        data: The data set, after `setup`.

    Raises:
        ValueError: An epoch has a batch of one row, and the network has such a batch norm.
    """
    size, rows = data.batch_size, math.ceil(len(data.train) / trainer.world_size)
    limit = trainer.limit_train_batches
    num_batches = math.ceil(rows / size)
    used = min(limit, num_batches) if isinstance(limit, int) else int(limit * num_batches)
    is_last_used = used == num_batches
    if 1 not in (size, rows % size if is_last_used else size):
        return
    name = _single_valued(model, data)
    if name is None:
        return
    fitting = next((b for b in range(size + 1, rows + 1) if rows % b != 1), None)
    remedy = "train on more than one row" if rows == 1 else f"choose task.batch_size={fitting}"
    what = "every batch" if size == 1 else f"the last batch of {rows} training rows"
    raise ValueError(
        f"task.batch_size={size}: {what} has one row, so the batch norm {name} gets one value per "
        f"channel, which has no variance; {remedy}, or use another network"
    )


@torch.no_grad()
def _single_valued(model: Method, data: TensorData) -> str | None:
    """Return the first batch norm that gets one value per channel from one row, or None."""
    found: list[str] = []

    def look(name: str, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            found.append(name)

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs))
        for name, module in model.net.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    was_training = model.training
    try:
        if hooks:
            with torch.random.fork_rng([]):  # evaluation mode, which does not update the statistics
                model.eval()(data.normalize(data.train.inputs[:1]))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
