"""TableData: base class of tables, standardized with the training rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bqnn.data.base import Rows, TensorData
from bqnn.data.normalization import standardize
from bqnn.text import short


class TableData(TensorData):
    """Base class for tables, with standardized float32 inputs [N, F] and targets [N].

    Targets are standardized numbers, or int64 class indices if there are `class_names`. Means and
    (population) standard deviations are computed in float64, from the training rows without
    validation rows. A constant column or target gets the standard deviation 1.

    Raises:
        ValueError: A standardized number, or a moment, leaves the range of floats.
    """

    class_names: list[str] | None = None  # None for regression
    input_names: list[str] | None = None  # for error messages
    input_mean: Tensor  # [F]
    input_std: Tensor  # [F]
    target_mean: Tensor  # []
    target_std: Tensor  # []

    def standardize(self, inputs: Tensor) -> Tensor:
        """Standardize inputs [N, F] given in original units; the result is float32."""
        return standardize(inputs, self.input_mean, self.input_std)

    def facts(self) -> dict[str, object]:
        return {
            **self._target_facts(),
            "input_mean": self.input_mean.tolist(),
            "input_std": self.input_std.tolist(),
            "input_shape": list(self.train.inputs.shape[1:]),
            "num_train": len(self.train),
        }

    def _target_facts(self) -> dict[str, object]:
        if self.class_names is not None:
            return {"likelihood": "classification", "class_names": list(self.class_names)}
        return {
            "likelihood": "regression",
            "target_mean": self.target_mean.item(),
            "target_std": self.target_std.item(),
        }

    def _arrange(self, part: Rows, test: Rows) -> tuple[Rows, Rows | None, Rows]:
        train, val, test = super()._arrange(part, test)
        self.input_mean, self.input_std = self._input_moments(train.inputs)
        if self.class_names is None:
            self.target_mean, self.target_std = _moments(train.targets)
        return (
            self._standardized(train),
            None if val is None else self._standardized(val),
            self._standardized(test),
        )

    def _input_moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the mean and the standard deviation [F] that standardize inputs [N, F]."""
        return _moments(inputs)

    def _standardized(self, rows: Rows) -> Rows:
        inputs, targets = self.standardize(rows.inputs), rows.targets
        _require_finite(inputs, rows.inputs, self.input_names)
        if self.class_names is None:
            targets = ((targets - self.target_mean) / self.target_std).float()
            _require_finite(targets, rows.targets)
        return Rows(inputs, targets)


def _require_finite(
    standardized: Tensor, original: Tensor, names: Sequence[str] | None = None
) -> None:
    bad = ~standardized.isfinite()
    if bad.any():
        where = "" if names is None else f" in column {short(names[int(bad.nonzero()[0, 1])])}"
        raise ValueError(
            f"a row has {original[bad][0].item():g}{where}, which is too far from the training "
            "rows: the standardized value exceeds float32; correct or remove the row"
        )


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
