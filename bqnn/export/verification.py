"""Compare a file with bqnn's int8, output by output, on the rows of a data set."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bqnn.data import TensorData
from bqnn.data.normalization import Normalization
from bqnn.data.tables import TableData
from bqnn.export.masks import MaskStatistics
from bqnn.export.model import Exported
from bqnn.inference.calibration import Calibration
from bqnn.inference.predict import BATCH_SIZE, predictive_sets
from bqnn.inference.predictions import Prediction, score, with_non_finite
from bqnn.layers.dropout import given_masks, one_mask_for_all_rows
from bqnn.methods import Method
from bqnn.methods.base import prepared

SUMMARY_TOLERANCE = 1e-4  # relative; the outputs of a classifier are rounded to float32


@dataclass(frozen=True, eq=False)
class Verification:
    """What a file and int8 compute for the same rows and draws.

    Attributes:
        form: The form of the file.
        prediction: The draws of the file, before its calibration.
        executed: The draws of int8, before the calibration.
        steps: The steps of the grid of each output [S, num_outputs].
        summary_difference: The largest relative difference of the mixture's outputs to those that
            bqnn computes from the same draws.
        seconds: The seconds of both for all rows and draws.
        float_parts: What computes in float outside of the integers, and may round otherwise.
        masks: How random the masks are that the file draws; None for fixed masks.
        calibration: The calibration of the model, or None.
    """

    form: str
    prediction: Prediction
    executed: Prediction
    steps: Tensor
    summary_difference: float
    seconds: Mapping[str, float]
    float_parts: list[str]
    masks: MaskStatistics | None = None
    calibration: Calibration | None = None

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
            for metric, value in with_non_finite(score, each.calibrated(self.calibration)).items()
            if np.isfinite(value)
        }
        return {
            "form": self.form,
            "masks": "fixed" if self.masks is None else "random",
            "rows": self.executed.samples.shape[1],
            "num_samples": self.executed.samples.shape[0],
            "outputs": self.executed.samples.numel(),
            "differing": self.differing,
            "largest_difference_steps": float(self.differences.max()),
            "summary_difference": self.summary_difference,
            "float_parts": self.float_parts,
            "random_masks": None if self.masks is None else self.masks.record(),
            "metrics": metrics,
            "seconds": dict(self.seconds),
        }

    def require_equal(self) -> None:
        """Raise a ValueError if outputs of the form `exact` differ, or masks are not random."""
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
        if self.masks is not None:
            self.masks.require_random()


def verify(
    session: Any, exported: Exported, integer: Method, rows: Tensor, targets: Tensor
) -> Verification:
    """Run a file and int8 on the same rows. Int8 gets the masks that the file draws.

    Args:
        session: The file in ONNX Runtime; masks that it draws are outputs, too.
        exported: What the file was written from.
        integer: The model in int8, with the seed of the file.
        rows: Rows in the units of the data [N, ...].
        targets: Targets [N].
    """
    num_samples, seconds = len(exported.steps), {"onnx": 0.0, "int8": 0.0}
    statistics = MaskStatistics(exported.rates, num_samples) if exported.masks else None
    names = [output.name for output in session.get_outputs()]
    batches, executed = [], []
    for part in rows.split(BATCH_SIZE):
        with _timed(seconds, "onnx"):
            answer = session.run(None, {"inputs": part.numpy().astype(exported.inputs.dtype)})
        outputs = {n: torch.from_numpy(a) for n, a in zip(names, answer, strict=True)}
        masks = [outputs.pop(port.name) for port in exported.masks]
        batches.append(outputs)
        if statistics is not None:
            statistics.add(masks)
            with _timed(seconds, "int8"):
                executed.append(predict_executed(integer, part, num_samples, masks))
    if statistics is None:
        with _timed(seconds, "int8"):
            executed = [predict_executed(integer, rows, num_samples)]
    found = {n: torch.cat([b[n] for b in batches], int(n == "samples")) for n in batches[0]}
    prediction = Prediction(integer.likelihood, found.pop("samples"), targets)
    return Verification(
        exported.form,
        prediction,
        Prediction(integer.likelihood, torch.cat(executed, 1), targets),
        exported.steps,
        _largest_difference(found, prediction.calibrated(integer.calibration).summary),
        seconds,
        exported.float_parts,
        statistics,
        integer.calibration,
    )


def predict_executed(
    integer: Method, rows: Tensor, num_samples: int, masks: Sequence[Tensor] | None = None
) -> Tensor:
    """Predict rows in int8 with the draws of a file.

    Args:
        integer: The model in int8.
        rows: Rows in the units of the data [N, ...], at most `BATCH_SIZE` if masks are given.
        num_samples: The number of draws S.
        masks: The masks of MC dropout in the order of its calls; None for those of a file with
            fixed masks, which are the same for all rows.

    Returns:
        The draws [S, N, num_outputs].
    """
    assert integer.recipe is not None
    normalization = Normalization.from_facts(integer.recipe["facts"])
    assert normalization is not None
    net = integer.net
    with one_mask_for_all_rows(net) if masks is None else given_masks(net, masks):
        batches = predictive_sets(  # the masks of a draw begin anew with each set
            net,
            rows.split(BATCH_SIZE),
            num_samples,
            prepare=prepared(normalization),
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


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the context to an entry."""
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def _largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    largest = 0.0
    for name, values in found.items():
        scale = expected[name].abs().clamp_min(1e-2)
        largest = max(largest, float(((values - expected[name]).abs() / scale).max()))
    return largest
