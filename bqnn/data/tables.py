"""TableData: base class of regression tables, standardized with the training rows."""

from __future__ import annotations

import torch
from torch import Tensor

from bqnn.data.base import Rows, TensorData
from bqnn.data.normalization import standardize


class TableData(TensorData):
    """Base class for regression, with standardized float32 inputs [N, F] and targets [N].

    Means and (population) standard deviations are computed in float64, from the training rows
    without validation rows. A constant column or target gets the standard deviation 1.

    Raises:
        ValueError: A standardized number, or a moment, leaves the range of floats.
    """

    input_mean: Tensor  # [F]
    input_std: Tensor  # [F]
    target_mean: Tensor  # []
    target_std: Tensor  # []

    def standardize(self, inputs: Tensor) -> Tensor:
        """Standardize inputs [N, F] given in original units; the result is float32."""
        return standardize(inputs, self.input_mean, self.input_std)

    def facts(self) -> dict[str, object]:
        return {
            "likelihood": "regression",
            "input_mean": self.input_mean.tolist(),
            "input_std": self.input_std.tolist(),
            "target_mean": self.target_mean.item(),
            "target_std": self.target_std.item(),
            "input_shape": list(self.train.inputs.shape[1:]),
            "num_train": len(self.train),
        }

    def _arrange(self, part: Rows, test: Rows) -> tuple[Rows, Rows | None, Rows]:
        train, val, test = super()._arrange(part, test)
        self.input_mean, self.input_std = _moments(train.inputs)
        self.target_mean, self.target_std = _moments(train.targets)
        return (
            self._standardized(train),
            None if val is None else self._standardized(val),
            self._standardized(test),
        )

    def _standardized(self, rows: Rows) -> Rows:
        targets = ((rows.targets - self.target_mean) / self.target_std).float()
        return Rows(
            _finite(self.standardize(rows.inputs), rows.inputs), _finite(targets, rows.targets)
        )


def _finite(standardized: Tensor, original: Tensor) -> Tensor:
    bad = ~standardized.isfinite()
    if bad.any():
        raise ValueError(
            f"a row has {original[bad][0].item():g}, which is too far from the training rows: "
            "the standardized value exceeds float32; correct or remove the row"
        )
    return standardized


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = values.mean(0), values.std(0, correction=0)
    # Rounding can give a constant column a tiny standard deviation, which must not be divided by.
    constant = (values == values[0]).all(0) | (std == 0)
    if not (mean.isfinite() & std.isfinite()).all():
        raise ValueError(
            f"the table has numbers up to {values.abs().max().item():g}, whose squares exceed "
            "float64; convert the column to another unit"
        )
    return torch.where(constant, values[0], mean), torch.where(constant, 1.0, std)
