"""Columns: how the cells of a table become inputs of a network."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bqnn.data.csv_file import CSVFile
from bqnn.text import short

log = logging.getLogger(__name__)

_MISSING = ("", "na", "n/a", "#n/a", "nan", "null", "?")  # in lower case
_LARGEST_WHOLE = 2**53  # float64 has all whole numbers up to it


@dataclass(frozen=True)
class Column:
    """A column of inputs, with numbers or with categories.

    A column of numbers is one input. A column of categories has one input for each category, which
    is 1 for its rows and 0 for others.

    Attributes:
        name: The name of the column.
        categories: The categories, or None for numbers.

    Examples:
        >>> from pathlib import Path
        >>> file = CSVFile(Path("a.csv"), {"color": ["red", "blue", "green"]}, [2, 3, 4], "")
        >>> Column("color", ("blue", "red")).encode(file)
        tensor([[0., 1.],
                [1., 0.],
                [0., 0.]], dtype=torch.float64)
    """

    name: str
    categories: tuple[str, ...] | None = None

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs that the column becomes."""
        if self.categories is None:
            return [self.name]
        return [f"{self.name}={category}" for category in self.categories]

    def encode(self, file: CSVFile, decimal: str = "point") -> Tensor:
        """Convert the cells of a table's column to inputs, in original units.

        A cell has the category with the same text, or else the only one with the same value, as 7
        and 007. All inputs are 0 for rows with another category, with a warning.

        Args:
            file: The table. It may have other columns, too.
            decimal: The decimal separator of numbers, `point` or `comma`.

        Returns:
            Inputs in float64 [N, number of inputs].

        Raises:
            ValueError: The table has no such column, or a cell is missing or not a number. The
                message names the file, the line and the column.
        """
        if self.name not in file.columns:
            raise ValueError(
                f"{file.where} has no column {short(self.name)}, which the network reads; add it"
            )
        if self.categories is None:
            return self._encode_numbers(file, decimal)
        index = {category: position for position, category in enumerate(self.categories)}
        values = Counter(_value(category, decimal) for category in index)
        by_value = {_value(category, decimal): position for category, position in index.items()}
        positions = []
        for row, cell in enumerate(file.columns[self.name]):
            if is_missing(cell):
                raise ValueError(f"{file.place(row, self.name)}; give a category")
            position, value = index.get(cell), _value(cell, decimal)
            if position is None and values[value] == 1:  # 7 is 007 if that is the only one
                position = by_value[value]
            positions.append(-1 if position is None else position)
        known = torch.tensor(positions)
        if num_unknown := int((known < 0).sum()):
            log.warning(
                "column %s: the categories of %d of %d rows are not among those of the training "
                "rows; these rows are 0 in all inputs of the column",
                *(short(self.name), num_unknown, len(known)),
            )
        return (known.unsqueeze(1) == torch.arange(len(self.categories))).double()

    def _encode_numbers(self, file: CSVFile, decimal: str) -> Tensor:
        numbers = []
        for row, cell in enumerate(file.columns[self.name]):
            value = number(cell, decimal)
            if value is None or value != value:
                raise ValueError(f"{file.place(row, self.name)}; give a number")
            numbers.append(value)
        return torch.tensor(numbers, dtype=torch.float64).unsqueeze(1)


def column_facts(columns: Iterable[Column]) -> dict[str, object]:
    """Return the facts, in JSON types, from which `columns_from` makes the columns again."""
    return {
        "feature_names": [column.name for column in columns],
        "feature_categories": [list(column.categories or ()) for column in columns],
    }


def columns_from(facts: Mapping[str, Any]) -> list[Column]:
    """Return the columns of inputs that the facts of a checkpoint describe.

    Examples:
        >>> facts = {"feature_names": ["area", "city"], "feature_categories": [[], ["a", "b"]]}
        >>> [column.input_names for column in columns_from(facts)]
        [['area'], ['city=a', 'city=b']]
    """
    both = zip(facts["feature_names"], facts["feature_categories"], strict=True)
    return [Column(name, tuple(categories) or None) for name, categories in both]


def encode_rows(rows: Mapping[str, Sequence[object]], facts: Mapping[str, Any]) -> Tensor:
    """Convert new rows of a table to inputs, in original units.

    Args:
        rows: The values of each column by its name, such as a pandas DataFrame. Columns that the
            network does not read are ignored.
        facts: The facts of a checkpoint, with `feature_names` and `feature_categories`.

    Returns:
        Inputs [N, F] in float64, before standardization.

    Raises:
        ValueError: A column is not there, or a value is missing or not a number. The message has
            the row, from 0, and the column.

    Examples:
        >>> facts = {"feature_names": ["area", "city"], "feature_categories": [[], ["a", "b"]]}
        >>> encode_rows({"city": ["b", "a"], "area": [70, 62.5]}, facts)
        tensor([[70.0000,  0.0000,  1.0000],
                [62.5000,  1.0000,  0.0000]], dtype=torch.float64)
    """
    columns = columns_from(facts)
    cells = {
        column.name: [_cell(value) for value in rows[column.name]]
        for column in columns
        if column.name in rows
    }
    lines = list(range(max(map(len, cells.values()), default=0)))
    file = CSVFile(Path("rows"), cells, lines, sha256="", counted="row")
    return torch.cat([column.encode(file) for column in columns], dim=1)


def is_missing(cell: str) -> bool:
    """Return whether a cell has no value: it is empty, NA, N/A, NaN, null or a question mark.

    Examples:
        >>> is_missing("n/a"), is_missing("0")
        (True, False)
    """
    return len(cell) < 5 and cell.casefold() in _MISSING


def number(cell: str, decimal: str = "point") -> float | None:
    """Convert a cell to a number, or to None if it is text.

    Examples:
        >>> number("1.5e3"), number("2,5", decimal="comma"), number("2,5"), number("1_000")
        (1500.0, 2.5, None, None)
    """
    if decimal == "comma":
        if "." in cell:  # it would separate thousands
            return None
        cell = cell.replace(",", ".")
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def category_of(cell: str, decimal: str = "point") -> str:
    """Return the category of a cell. It is the same for 1 and 1.0, and for True and true.

    Examples:
        >>> category_of("1.0"), category_of("True"), category_of("Ghent")
        ('1', 'true', 'Ghent')
    """
    value = number(cell, decimal)
    if value is not None and abs(value) <= _LARGEST_WHOLE and value.is_integer():
        return str(int(value))
    return cell.casefold() if cell.casefold() in ("true", "false") else cell


def _value(category: str, decimal: str) -> float | str:
    """Return the number that a category is, or else the category."""
    value = number(category, decimal)
    return category_of(category, decimal) if value is None else value


def _cell(value: object) -> str:
    """Return a value of Python, NumPy or pandas as a cell."""
    text = str(value).strip()
    return "" if not isinstance(value, str) and text in ("None", "<NA>", "NaT") else text
