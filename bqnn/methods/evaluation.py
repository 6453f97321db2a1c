"""Validation and test of a method: collect predictions, score them, and log the metrics."""

from collections.abc import Mapping
from functools import cached_property

import pytorch_lightning as pl
import torch
from torch import Tensor

from bqnn.inference.likelihoods import Likelihood
from bqnn.inference.metrics import MixtureMetrics, NotFiniteError
from bqnn.inference.predictions import Prediction, score


class Evaluation:
    """The predictions of the batches of a validation or test epoch, and their metrics.

    The class is not a module, so that the float64 sums of the metrics stay on the CPU.

    Args:
        likelihood: The likelihood of the network's outputs.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self._predictions: list[Prediction] = []

    @cached_property
    def metrics(self) -> MixtureMetrics:
        """The metrics of the likelihood, which are created once."""
        return self.likelihood.metrics(sync_on_compute=False)

    def record(self, samples: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            samples: Draws of the output [S, B, num_outputs].
            targets: Targets [B].
        """
        self._predictions.append(Prediction(self.likelihood, samples.cpu(), targets.cpu()))

    def finish(self, split: str, module: pl.LightningModule) -> None:
        """Score all batches, log the metrics as `<split>/<name>`, and start again.

        Args:
            split: `val` or `test`.
            module: The module that logs.

        Raises:
            NotFiniteError: A metric is infinite or NaN. The error contains all metrics.
        """
        predictions, self._predictions = self._predictions, []
        try:
            metrics = _named(split, score(*predictions, metrics=self.metrics))
        except NotFiniteError as error:
            raise NotFiniteError(f"{split}/{error}", _named(split, error.metrics)) from None
        if module.trainer.state.fn == "fit" and not module.trainer.sanity_checking:
            log_in_fit(module, metrics, torch.float64)
        else:
            # Lightning converts plain numbers to float32, and weights them by the batch size.
            module.log_dict(_tensors(metrics, torch.float64), batch_size=1)


def log_in_fit(module: pl.LightningModule, values: Mapping[str, float], dtype: torch.dtype) -> None:
    """Log values of an epoch that need no averaging.

    `LightningModule.log` creates a metric for each value, which took an eighth of the training time
    on a small table. Lightning's LearningRateMonitor bypasses it in the same way.

    Args:
        module: The module that is trained.
        values: Values by name. Loggers get them unchanged.
        dtype: The type of the tensors that callbacks get.
    """
    trainer, tensors = module.trainer, _tensors(values, dtype)
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
    for logger in module.loggers:
        # Lightning logs the metrics of an epoch with this step.
        logger.log_metrics({"epoch": module.current_epoch, **values}, step=module.global_step - 1)
        logger.save()


def _named(split: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in metrics.items()}


def _tensors(values: Mapping[str, float], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}
