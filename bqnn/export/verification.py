"""Compare a file with bqnn's int8, output by output, on the rows of a data set."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bqnn.data import TensorData
from bqnn.data.normalization import Normalization
from bqnn.data.tables import TableData
from bqnn.export.model import Exported
from bqnn.inference.predict import BATCH_SIZE, predictive_sets
from bqnn.inference.predictions import Prediction, score, with_non_finite
from bqnn.layers.dropout import one_mask_for_all_rows
from bqnn.methods import Method
from bqnn.methods.base import channels_last

SUMMARY_TOLERANCE = 1e-4  # relative; the outputs of a classifier are rounded to float32


@dataclass(frozen=True, eq=False)
class Verification:
    """What a file and int8 compute for the same rows and draws.

    Attributes:
        form: The form of the file.
        prediction: The draws of the file.
        executed: The draws of int8.
        steps: The steps of the grid of each output [S, num_outputs].
        summary_difference: The largest relative difference of the mixture's outputs to those that
            bqnn computes from the same draws.
        seconds: The seconds of both for all rows and draws.
        float_parts: What computes in float outside of the integers, and may round otherwise.
    """

    form: str
    prediction: Prediction
    executed: Prediction
    steps: Tensor
    summary_difference: float
    seconds: Mapping[str, float]
    float_parts: list[str]

    @property
    def differences(self) -> Tensor:
        """The differences of the outputs in steps of their grids [S, N, num_outputs]."""
        found, expected = (each.samples.double() for each in (self.prediction, self.executed))
        differences = (found - expected).abs() / self.steps[:, None]
        # What computes in float may round otherwise; a difference of integers moves it further.
        return torch.where(differences < 0.01, 0, differences) if self.float_parts else differences

    @property
    def differing(self) -> int:
        """The number of outputs that differ."""
        return int((self.differences != 0).sum())

    def record(self) -> dict[str, Any]:
        """Return the content of verification.json."""
        metrics = {
            f"{name}/{metric}": value
            for name, each in (("onnx", self.prediction), ("int8", self.executed))
            for metric, value in with_non_finite(score, each).items()
            if np.isfinite(value)
        }
        return {
            "form": self.form,
            "rows": self.executed.samples.shape[1],
            "num_samples": self.executed.samples.shape[0],
            "outputs": self.executed.samples.numel(),
            "differing": self.differing,
            "largest_difference_steps": float(self.differences.max()),
            "summary_difference": self.summary_difference,
            "float_parts": self.float_parts,
            "metrics": metrics,
            "seconds": dict(self.seconds),
        }

    def require_equal(self) -> None:
        """Raise a ValueError if the form is `exact` and an output differs."""
        if self.form == "exact" and self.differing:
            raise ValueError(
                f"model.onnx: {self.differing} of {self.differences.numel()} outputs differ from "
                f"int8, by up to {float(self.differences.max()):.3g} steps: this runtime or CPU "
                "does not compute as the file says, or int8 saturates here; verification.json has "
                "the details, do not use the file"
            )
        if not self.summary_difference <= SUMMARY_TOLERANCE:
            raise ValueError(
                "model.onnx: what it computes from its draws differs from bqnn's by up to "
                f"{self.summary_difference:.3g}; verification.json has the details, do not use "
                "the file"
            )


def verify(
    session: Any, exported: Exported, integer: Method, rows: Tensor, targets: Tensor
) -> Verification:
    """Run a file and int8 on the same rows.

    Args:
        session: The file in ONNX Runtime.
        exported: What the file was written from.
        integer: The model in int8, with the seed of the file.
        rows: Rows in the units of the data [N, ...].
        targets: Targets [N].
    """
    start = time.perf_counter()
    parts = [part.numpy().astype(exported.inputs.dtype) for part in rows.split(BATCH_SIZE)]
    batches = [session.run(None, {"inputs": part}) for part in parts]
    middle = time.perf_counter()
    executed = predict_executed(integer, rows, len(exported.steps))
    end = time.perf_counter()
    names = [output.name for output in session.get_outputs()]
    found = {
        name: torch.from_numpy(np.concatenate([b[place] for b in batches], int(name == "samples")))
        for place, name in enumerate(names)
    }
    prediction = Prediction(integer.likelihood, found.pop("samples"), targets)
    return Verification(
        exported.form,
        prediction,
        Prediction(integer.likelihood, executed, targets),
        exported.steps,
        _largest_difference(found, prediction.summary),
        {"onnx": middle - start, "int8": end - middle},
        exported.float_parts,
    )


def predict_executed(integer: Method, rows: Tensor, num_samples: int) -> Tensor:
    """Predict rows in int8 with the draws of a file, which has one mask for all rows.

    Args:
        integer: The model in int8.
        rows: Rows in the units of the data [N, ...].
        num_samples: The number of draws S.

    Returns:
        The draws [S, N, num_outputs].
    """
    assert integer.recipe is not None
    normalization = Normalization.from_facts(integer.recipe["facts"])
    assert normalization is not None
    with one_mask_for_all_rows(integer.net):
        batches = predictive_sets(  # the masks of a draw begin anew with each set
            integer.net,
            rows.split(BATCH_SIZE),
            num_samples,
            prepare=lambda batch: channels_last(normalization(batch)),
            seed=integer.seed,
        )
    return torch.cat(batches, 1)


def rows_in_units(data: TensorData) -> Tensor:
    """Return the test rows in the units of the data, as a file reads them.

    Raises:
        TypeError: The data set stores neither pixels in uint8 nor a standardized table.
    """
    inputs = data.test.inputs
    if isinstance(data, TableData):
        return inputs.double() * data.input_std + data.input_mean
    if inputs.dtype != torch.uint8:
        raise TypeError(
            f"export: the test rows are {inputs.dtype}, and a file reads pixels in uint8; store "
            "the images of the data set in uint8"
        )
    return inputs


def _largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    largest = 0.0
    for name, values in found.items():
        scale = expected[name].abs().clamp_min(1e-2)
        largest = max(largest, float(((values - expected[name]).abs() / scale).max()))
    return largest
