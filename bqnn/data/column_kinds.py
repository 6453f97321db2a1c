"""Find columns in a CSV file, and decide whether they have numbers or categories."""

from __future__ import annotations

import re

from bqnn.arguments import ArgumentError
from bqnn.data.columns import category_of, is_missing, number
from bqnn.data.csv_file import CSVFile
from bqnn.data.notations import has_decimal_comma, odd_notation
from bqnn.text import counted, printable, short

MOST_CATEGORIES = 100  # of a column that is not listed as one of categories
MOST_CLASSES = 1000
_MOST_LISTED = 10_000
_LARGEST = 1e150  # its square is in the range of float64
_LONGEST = 200  # characters of a category


def find_column(file: CSVFile, wanted: str | int, argument: str) -> str:
    """Find a column by its name, or by its index from 0, where -1 is the last column.

    Args:
        file: The table.
        wanted: The name or the index. A name wins.
        argument: The argument that has the name, for the error message.

    Raises:
        ValueError: There is no such column.
    """
    names = list(file.columns)
    if str(wanted) in names:
        return str(wanted)
    if isinstance(wanted, int) and -len(names) <= wanted < len(names):
        return names[wanted]
    shown = ", ".join(map(short, names[:20])) + (", ..." if len(names) > 20 else "")
    raise ArgumentError(
        f"{argument}={short(wanted)}: {file.where} has no such column; choose one of {shown} "
        "(commas, semicolons, tabs or | separate columns)",
        argument,
    )


def missing_cells(file: CSVFile, name: str) -> list[int]:
    """Return the rows in which a column has no value."""
    return [row for row, cell in enumerate(file.columns[name]) if is_missing(cell)]


def has_categories(file: CSVFile, name: str, decimal: str) -> bool:
    """Return whether a column of inputs has text, which means categories.

    Args:
        file: The table, without missing cells.
        name: The name of the column.
        decimal: The decimal separator of numbers, `point` or `comma`.

    Raises:
        ValueError: The column has numbers and text, numbers or dates in a notation that is not
            read, numbers that are too large, or too many categories.
    """
    remedy = f"take each value as a category (categories=[{_quoted(name)}])"
    if has_numbers(file, name, decimal, remedy, "categories"):
        return False
    categories = categories_of(file, name, decimal)
    refuse_notation(file, name, decimal, f"{remedy}, or leave it out (ignore=[{_quoted(name)}])")
    if len(categories) > MOST_CATEGORIES:
        raise ArgumentError(
            f"{file.place(0, name)}, and the column has {len(categories)} different texts, each of "
            "which would be an input of the network; leave out the column "
            f"(ignore=[{_quoted(name)}]), or keep them all (categories=[{_quoted(name)}])",
            *("ignore", "categories"),
        )
    return True


def has_classes(file: CSVFile, name: str, decimal: str) -> bool:
    """Return whether a column of targets has text or just two values, which means classes.

    Args:
        file: The table, without missing cells.
        name: The name of the column.
        decimal: The decimal separator of numbers, `point` or `comma`.

    Raises:
        ValueError: The column has numbers and text, numbers or dates in a notation that is not
            read, or a number is too large.
    """
    remedy = "take each value as a class (kind=classification)"
    if has_numbers(file, name, decimal, remedy, "kind"):
        return len(set(file.columns[name])) == 2
    refuse_notation(file, name, decimal, remedy)
    return True


def refuse_notation(file: CSVFile, name: str, decimal: str, remedy: str) -> None:
    """Refuse a column of text that is numbers, times or dates in a notation that is not read.

    Args:
        file: The table, without missing cells.
        name: The name of the column, which has no number.
        decimal: The decimal separator of numbers, `point` or `comma`.
        remedy: What to do if the text is meant as it is, for the error message.

    Raises:
        ValueError: The text is numbers, times or dates.
    """
    found = odd_notation(file.columns[name])
    if found is None:
        return
    row, kind = found
    if kind == "decimal comma" and decimal == "point":
        raise ArgumentError(
            f"{file.place(row, name)}, which has no decimal point; set decimal=comma", "decimal"
        )
    example = "60 or 1500.5" if decimal == "point" else "60 or 1500,5"
    do = {
        "date": "convert dates to numbers, such as the month or the days since the first one",
        "time": "convert times to plain numbers, such as minutes",
    }.get(kind, f"write plain numbers, such as {example}, without signs, units and separators")
    what = f"a {kind}" if kind in ("date", "time") else "a number that would be read as text"
    raise ArgumentError(
        f"{file.place(row, name)}, {what}; {do}, or {remedy}",
        *("kind", "categories", "ignore"),
    )


def has_numbers(file: CSVFile, name: str, decimal: str, remedy: str, argument: str) -> bool:
    """Return whether all cells of a column are numbers; False if none are.

    Args:
        file: The table, without missing cells.
        name: The name of the column.
        decimal: The decimal separator of numbers, `point` or `comma`.
        remedy: What to do if some cells are numbers and some are text, for the error message.
        argument: The argument that the remedy names.

    Raises:
        ValueError: Some cells are numbers and some are text, or a number is too large.
    """
    numbers = [number(cell, decimal) for cell in file.columns[name]]
    text = next((row for row, value in enumerate(numbers) if value is None), None)
    first = next((row for row, value in enumerate(numbers) if value is not None), None)
    if text is not None and first is not None:
        if decimal == "point" and has_decimal_comma(file.columns[name][text]):
            remedy = f"set decimal=comma, or {remedy}"
        raise ArgumentError(
            f"{file.place(text, name)}, but line {file.lines[first]} has the number "
            f"{short(file.columns[name][first])}; correct one of them, or {remedy}",
            *(argument, "decimal"),
        )
    for row, value in enumerate(numbers):
        if value is not None and not abs(value) <= _LARGEST:
            raise ValueError(
                f"{file.place(row, name)}, but numbers must be finite and at most {_LARGEST:g}; "
                "correct it, or convert the column to another unit"
            )
    return text is None


def categories_of(file: CSVFile, name: str, decimal: str, *, as_written: bool = False) -> list[str]:
    """Return the different categories of a column, numbers first.

    Args:
        file: The table.
        name: The name of the column.
        decimal: The decimal separator of numbers, `point` or `comma`.
        as_written: Whether different text is always a different category; otherwise, 1 and 1.0 are
            the same, and so are true and True.

    Raises:
        ValueError: A cell is too long for a category, or there are too many.
    """
    cells = file.columns[name]
    for row, cell in enumerate(cells):
        if len(cell) > _LONGEST:
            raise ArgumentError(
                f"{file.row(row)}, column {short(name)} has text of {len(cell)} characters, which "
                f"is not a category; leave out the column (ignore=[{_quoted(name)}])",
                "ignore",
            )
    found = set(cells) if as_written else {category_of(cell, decimal) for cell in cells}
    numbers = {each: number(each, decimal) for each in found}
    if len(numbers) > _MOST_LISTED:
        raise ArgumentError(
            f"{file.where}: column {short(name)} has {len(numbers)} different values, but at most "
            f"{_MOST_LISTED} can be inputs; leave out the column (ignore=[{_quoted(name)}])",
            "ignore",
        )
    return sorted(numbers, key=lambda each: (numbers[each] is None, numbers[each] or 0.0, each))


def refuse_missing(file: CSVFile, name: str, is_target: bool) -> None:
    """Refuse a column with a missing cell.

    Raises:
        ValueError: The column has a missing cell. The message has its line.
    """
    rows = missing_cells(file, name)
    if rows:
        remedy = "" if is_target else f", leave out the column (ignore=[{_quoted(name)}])"
        raise ArgumentError(
            f"{file.place(rows[0], name)}, and {len(rows)} of its "
            f"{counted(len(file.lines), 'cell')} have no value; fill them in"
            f"{remedy}, or leave out such rows (missing=drop)",
            *("ignore", "missing"),
        )


def _quoted(name: str) -> str:
    """Return the name of a column as a command line takes it."""
    return name if re.fullmatch(r"[A-Za-z_][\w-]*", name, re.ASCII) else f'"{printable(name)}"'
