"""CSVData: regression or classification with the columns of a CSV file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bqnn.arguments import ArgumentError
from bqnn.data.base import Rows
from bqnn.data.column_kinds import (
    MOST_CLASSES,
    categories_of,
    find_column,
    has_categories,
    has_classes,
    has_numbers,
    missing_cells,
    refuse_missing,
    refuse_notation,
)
from bqnn.data.columns import Column, category_of, column_facts, number
from bqnn.data.csv_file import CSVFile, read_csv, read_names
from bqnn.data.split import draw_test_rows
from bqnn.data.tables import TableData
from bqnn.text import counted, printable, short

log = logging.getLogger(__name__)


class CSVData(TableData):
    """The rows of a CSV file, split at random.

    Columns of numbers are standardized. Columns of text have one input for each category of the
    training rows, 0 or 1. Test rows are drawn from all rows, with equal shares of each class, and
    validation rows from the others.

    Args:
        file: The path of the file.
        target: The column to predict: its name, or its index from 0, where -1 is the last one.
        kind: `regression`, `classification`, or `auto`: classification if the target has text or
            exactly two values.
        features: The columns of inputs, by name or index; None for all but the target.
        ignore: Columns that are not inputs.
        categories: Columns whose values are categories, even if they are numbers. Different text
            is a different category, such as 7 and 007.
        missing: `refuse` missing values, or `drop` the rows that have them.
        decimal: The decimal separator of numbers, `point` or `comma`.
        test_share: The share of rows for the test.
        data_dir: Unused, common to all data sets.
        seed: Seed of the split, and of the order of training batches.
        batch_size: The number of rows in a training batch.
        validation_share: The share of training rows for validation.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A column does not exist, a value is missing or cannot be used, or no row is left
            for the test. The message names the file, the line, the column and a remedy.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "flats.csv")
        ...     size = path.write_text("area,city,price\\n" + "70,Ghent,210\\n62,Aalst,150\\n" * 5)
        ...     data = CSVData(str(path), target="price", kind="regression")
        ...     data.setup()
        >>> data.input_names, data.train.inputs.shape, data.test.inputs.shape
        (['area', 'city=Aalst', 'city=Ghent'], torch.Size([7, 3]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        file: str,
        target: str | int,
        *,
        kind: str = "auto",
        features: Sequence[str | int] | None = None,
        ignore: Sequence[str | int] = (),
        categories: Sequence[str | int] = (),
        missing: str = "refuse",
        decimal: str = "point",
        test_share: float = 0.2,
        data_dir: str = "data",
        seed: int = 0,
        batch_size: int = 100,
        validation_share: float = 0.1,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            seed=seed,
            batch_size=batch_size,
            validation_share=validation_share,
        )
        choices = {
            "kind": (kind, ("auto", "regression", "classification")),
            "missing": (missing, ("refuse", "drop")),
            "decimal": (decimal, ("point", "comma")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ArgumentError(f"{name}={short(value)}: choose {' or '.join(known)}", name)
        self.path = Path(file).expanduser()
        self.target = target
        self.kind = kind
        self.features = features
        self.ignore = ignore
        self.categories = categories
        self.missing = missing
        self.decimal = decimal
        self.test_share = test_share
        self.columns: list[Column] = []
        self.target_name = ""
        self.sha256 = ""

    def facts(self) -> dict[str, object]:
        return {
            **super().facts(),
            **column_facts(self.columns),
            "target_name": self.target_name,
            "source_sha256": self.sha256,
        }

    def _read(self) -> tuple[Rows, Rows]:
        file = read_csv(self.path)
        self.sha256 = file.sha256
        features, listed = self._chosen(file)
        file = self._complete(file, features)
        targets = self._targets(file)
        has_text = {
            name: name in listed or has_categories(file, name, self.decimal) for name in features
        }
        labels = targets if self.class_names is not None else torch.zeros(len(targets))
        is_test = draw_test_rows(labels, self.test_share, self.seed)
        train = file.take((~is_test).nonzero().flatten().tolist())
        self.columns = [
            Column(name, self._categories(train, name, name in listed) if text else None)
            for name, text in has_text.items()
        ]
        self.input_names = [name for column in self.columns for name in column.input_names]
        self._log(file)
        inputs = torch.cat([column.encode(file, self.decimal) for column in self.columns], dim=1)
        rows = Rows(inputs, targets)
        return rows.take(~is_test), rows.take(is_test)

    def check_source(self) -> None:
        self._chosen(read_names(self.path))

    def _chosen(self, file: CSVFile) -> tuple[list[str], set[str]]:
        """Return the columns of inputs, in the order of the file, and the listed categories."""
        self.target_name = find_column(file, self.target, "target")
        listed = {find_column(file, name, "categories") for name in self.categories}
        ignored = {find_column(file, name, "ignore") for name in self.ignore}
        chosen = set(file.columns) - {self.target_name}
        if self.features is not None:
            chosen = {find_column(file, name, "features") for name in self.features}
        if self.target_name in chosen:
            raise ArgumentError(
                f"features: {short(self.target_name)} is the column to predict; leave it out",
                "features",
            )
        names = [name for name in file.columns if name in chosen - ignored]
        if not names:
            raise ArgumentError(
                f"{file.where}: no input column is left besides {short(self.target_name)}; "
                f"{self._more_columns(file)}",
                *("features", "ignore"),
            )
        return names, listed

    def _more_columns(self, file: CSVFile) -> str:
        """Return what gives a table inputs, for an error message."""
        if len(file.columns) == 1:
            return "separate columns by commas, semicolons, tabs or |, or add a column"
        if self.features is not None:
            return "list other columns (features=null: all but the target)"
        return "leave one out of ignore"

    def _categories(self, file: CSVFile, name: str, is_listed: bool) -> tuple[str, ...]:
        return tuple(categories_of(file, name, self.decimal, as_written=is_listed))

    def _complete(self, file: CSVFile, features: list[str]) -> CSVFile:
        """Refuse missing values, or drop the rows that have them."""
        names = [self.target_name, *features]
        if self.missing == "refuse":
            for name in names:
                refuse_missing(file, name, is_target=name == self.target_name)
        dropped = {row for name in names for row in missing_cells(file, name)}
        if dropped:
            log.warning(
                "%s: %d of %d rows have missing values and are left out",
                *(file.where, len(dropped), len(file.lines)),
            )
            file = file.take([row for row in range(len(file.lines)) if row not in dropped])
        if len(file.lines) < 2:
            raise ValueError(
                f"{file.where} has {counted(len(file.lines), 'complete row')} below its line of "
                "names; a table needs at least two, one to train and one to test"
            )
        return file

    def _targets(self, file: CSVFile) -> Tensor:
        """Return numbers in float64 [N], or class indices [N]."""
        name, cells = self.target_name, file.columns[self.target_name]
        kind = self.kind
        if kind == "auto":
            kind = "classification" if has_classes(file, name, self.decimal) else "regression"
        if kind == "regression":
            if not has_numbers(file, name, self.decimal, "predict classes", "kind"):
                refuse_notation(file, name, self.decimal, "predict classes (kind=classification)")
                raise ArgumentError(
                    f"kind=regression: {file.place(0, name)}, which is not a number; choose "
                    "kind=classification, or another column",
                    "kind",
                )
            values = [number(cell, self.decimal) for cell in cells]
            if len(set(values)) == 1:
                raise ArgumentError(
                    f"{file.where}: column {short(name)} has {short(cells[0])} in every row, so "
                    "there is nothing to predict; choose another column (target)",
                    "target",
                )
            return torch.tensor(values, dtype=torch.float64)
        self.class_names = categories_of(file, name, self.decimal)
        if not 2 <= len(self.class_names) <= MOST_CLASSES:
            raise ArgumentError(
                f"{file.where}: column {short(name)} has "
                f"{counted(len(self.class_names), 'different value')}, but a classification has 2 "
                f"to {MOST_CLASSES} classes; choose another column, or kind=regression for numbers",
                "kind",
            )
        index = {each: position for position, each in enumerate(self.class_names)}
        return torch.tensor([index[category_of(cell, self.decimal)] for cell in cells])

    def _input_moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the inputs of categories at 0 and 1."""
        mean, std = super()._input_moments(inputs)
        is_category = torch.tensor(
            [column.categories is not None for column in self.columns for _ in column.input_names]
        )
        return mean.masked_fill(is_category, 0.0), std.masked_fill(is_category, 1.0)

    def _log(self, file: CSVFile) -> None:
        """Log what was decided about the columns."""
        if self.class_names is None:
            what = "regression"
        else:
            what = f"classification with {len(self.class_names)} classes"
        how = " (kind=auto)" if self.kind == "auto" else ""
        numbers = [column for column in self.columns if column.categories is None]
        log.info(
            "%s: %d rows; %s%s of column %s; %s of numbers; columns of categories: %s",
            *(file.where, len(file.lines), what, how, short(self.target_name)),
            counted(len(numbers), "column"),
            _shown([column for column in self.columns if column.categories is not None]),
        )


def _shown(columns: Sequence[Column]) -> str:
    """List columns of categories with the number of inputs of each."""
    shown = (f"{printable(column.name)} ({len(column.input_names)})" for column in columns)
    return ", ".join(shown) or "none"
