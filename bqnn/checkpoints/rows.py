"""Read rows that a user gives to a model, in the units of the data."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from bqnn.arguments import ArgumentError, ArgumentTypeError
from bqnn.data.columns import encode_rows
from bqnn.layers.finite import refuse_non_finite
from bqnn.text import short


def read_rows(rows: object, facts: Mapping[str, Any]) -> Tensor:
    """Convert rows to a tensor, and check them.

    Args:
        rows: Features [N, F], or images [N, C, H, W] with pixels from 0 to `input_scale`: a NumPy
            array, a tensor, nested lists or a pandas DataFrame. If the facts have names of
            features, as those of a CSV file, the columns of a DataFrame or of a dictionary are
            taken by name, and categories are encoded.
        facts: The facts in the recipe of a model.

    Returns:
        The rows [N, ...] on the CPU, in uint8, int64 or float64.

    Raises:
        ArgumentTypeError: The rows are not numbers.
        ArgumentError: The shape is wrong, there is no row, a value is not finite, or pixels are out
            of their range.

    Examples:
        >>> facts = {"input_shape": [2], "input_mean": [0.0, 0.0], "input_std": [1.0, 1.0]}
        >>> read_rows([[1, 2], [3, 4], [5, 6]], facts).shape
        torch.Size([3, 2])
    """
    if "feature_names" in facts and _has_columns(rows):
        values = _from_columns(rows, facts)
    elif isinstance(rows, Sequence) and any(isinstance(row, Mapping) for row in rows):
        raise ArgumentTypeError(
            "rows are a list of dictionaries; give one dictionary of columns, such as "
            "{name: [row[name] for row in rows] for name in rows[0]}, or a DataFrame"
            if "feature_names" in facts
            else "rows are a list of dictionaries; give an array with the numbers of each row",
            "rows",
        )
    elif isinstance(rows, Tensor):
        values = _from_tensor(rows)
    else:
        values = _from_array(_as_array(rows, facts))
    _check_shape(values, facts)
    try:
        refuse_non_finite(values, "the input")
    except ValueError as error:
        raise ArgumentError(f"rows: {error}", "rows") from None
    if "input_scale" in facts:
        _check_pixels(values, facts["input_scale"])
    return values


def _has_columns(rows: object) -> TypeGuard[Mapping[str, Any]]:
    """Return whether rows are a DataFrame or a dictionary, without importing pandas."""
    pandas = sys.modules.get("pandas")
    return isinstance(rows, Mapping) or (pandas is not None and isinstance(rows, pandas.DataFrame))


def _from_columns(rows: Mapping[str, Any], facts: Mapping[str, Any]) -> Tensor:
    lengths = [_length(name, rows[name]) for name in facts["feature_names"] if name in rows]
    if len(set(lengths)) > 1:
        raise ArgumentError(
            f"rows: the columns have {min(lengths)} to {max(lengths)} values; give one value per "
            "row in each column",
            "rows",
        )
    return encode_rows(rows, facts)


def _length(name: str, column: object) -> int:
    values = np.asarray(column, dtype=object)
    if values.ndim != 1:
        raise ArgumentError(
            f"rows: column {short(name)} is {short(column)}; give a list with one value per row",
            "rows",
        )
    return len(values)


def _as_array(rows: object, facts: Mapping[str, Any]) -> np.ndarray:
    if np.ma.is_masked(rows):  # np.asarray would take the values below the mask
        raise ArgumentError("rows: some values are masked; remove these rows, or fill them", "rows")
    try:
        array = np.asarray(rows)
    except Exception as error:  # ragged lists, and what objects raise when they are converted
        raise ArgumentError(
            "rows cannot be one array of numbers; give each row the same number of values", "rows"
        ) from error
    if array.dtype.kind not in "iuf":
        raise ArgumentTypeError(
            f"rows of {_kind(rows, array)}: expected numbers; convert the other values"
            f"{_or_columns(facts)}",
            "rows",
        )
    return array


def _kind(rows: object, array: np.ndarray) -> str:
    """Describe what rows hold, for an error message."""
    if array.ndim == 0:
        return short(rows)
    kinds = {"U": "strings", "S": "bytes", "b": "booleans", "c": "complex numbers", "M": "dates"}
    return kinds.get(array.dtype.kind, "mixed or missing values")


def _from_array(array: np.ndarray) -> Tensor:
    is_whole = array.dtype.kind in "iu" and array.dtype != np.uint64
    dtype = np.uint8 if array.dtype == np.uint8 else np.int64 if is_whole else np.float64
    # torch warns of arrays that cannot be written, and takes no negative strides.
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))


def _from_tensor(rows: Tensor) -> Tensor:
    is_dense = rows.layout == torch.strided and not (rows.is_nested or rows.is_meta)
    if not is_dense or rows.is_quantized or rows.is_complex() or rows.dtype == torch.bool:
        raise ArgumentTypeError(
            f"rows are a tensor of {rows.dtype} ({rows.layout}); give a dense tensor of real "
            "numbers",
            "rows",
        )
    rows = rows.detach().cpu()
    if rows.is_floating_point() or rows.dtype == torch.uint64:
        return rows.double()
    return rows if rows.dtype == torch.uint8 else rows.long()


def _or_columns(facts: Mapping[str, Any]) -> str:
    """Return how to give a table by the names of its columns, if they have names."""
    names = facts.get("feature_names", [])
    shown = [short(name, 30) for name in names[:8]] + ["..."] * (len(names) > 8)
    return f", or give a DataFrame with the columns {', '.join(shown)}" if names else ""


def _check_shape(values: Tensor, facts: Mapping[str, Any]) -> None:
    shape: Sequence[int] = facts["input_shape"]
    given = list(values.shape)
    if given[1:] == list(shape) and len(values) > 0:
        return
    expected = f"[N, {', '.join(map(str, shape))}]"
    if given == list(shape):
        remedy = "give one row as rows[None]"
    elif len(shape) == 3 and given[1:] == [*shape[1:], shape[0]]:
        remedy = "move the channels to the front: rows.transpose(0, 3, 1, 2) in NumPy"
    elif len(shape) == 3 and shape[0] == 1 and given[1:] == list(shape[1:]):
        remedy = "add the axis of the channel: rows[:, None]"
    elif given[1:] == list(shape):
        remedy = "give at least one row"
    else:
        kind = f"the {shape[0]} features" if len(shape) == 1 else "images of the size"
        remedy = f"give {kind} of the training"
    raise ArgumentError(
        f"rows of shape {given}: expected {expected}; {remedy}{_or_columns(facts)}", "rows"
    )


def _check_pixels(values: Tensor, scale: float) -> None:
    """Refuse pixels out of the range from 0 to `scale`, and those that were scaled before."""
    flat = values.flatten(1)
    least, most = flat.min().item(), flat.max().item()
    if least < 0 or most > scale:
        raise ArgumentError(
            f"rows: a pixel is {least if least < 0 else most:g}; give pixels from 0 to {scale:g}, "
            "as in the files, which the model normalizes itself",
            "rows",
        )
    if not values.is_floating_point() or scale <= 1:
        return
    largest = flat.amax(1)
    is_scaled = (largest > 0) & (largest <= 1)
    if is_scaled.any():
        row = int(is_scaled.nonzero()[0])
        raise ArgumentError(
            f"rows: the pixels of row {row} (counted from 0) are floats up to "
            f"{largest[row].item():g}, but the model expects 0 to {scale:g}; multiply them by "
            f"{scale:g}, or convert them to integers if the image is almost black",
            "rows",
        )
