"""A callback that records what the steps of a training compute."""

from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from bqnn.methods import Method
from bqnn.methods.graphs import GraphedSteps


class Losses(pl.Callback):
    """Records the loss of each step, and the number of CUDA graphs."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.num_graphs = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.losses.append(outputs["loss"].clone())
        assert isinstance(pl_module, Method)
        if isinstance(pl_module.compiled_terms, GraphedSteps):
            self.num_graphs = len(pl_module.compiled_terms.graphs)
