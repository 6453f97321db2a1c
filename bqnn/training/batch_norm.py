"""Refuse batches in which batch norm would see one value per channel."""

import math

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from bqnn.data import TensorData
from bqnn.methods import Method


def refuse_single_values(trainer: pl.Trainer, model: Method, data: TensorData) -> None:
    """Refuse a batch of one row that a batch norm sees at one position.

    It would get one value per channel, which has no variance.

    Raises:
        ValueError: There is such a batch in an epoch, and such a batch norm in the network.
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
        f"task.batch_size={size}: {what} has one row, of which the batch norm {name} sees one "
        f"value per channel and can take no variance; {remedy}, or another network"
    )


@torch.no_grad()
def _single_valued(model: Method, data: TensorData) -> str | None:
    """The name of the first batch norm that gets one value per channel from one row, or None."""
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
            with torch.random.fork_rng([]):  # in eval mode, in which nothing is learned
                model.eval()(data.normalize(data.train.inputs[:1]))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
