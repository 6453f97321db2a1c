"""Find numbers, times and dates that are written so that they would be read as text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_MOST_WITH_UNIT = 10  # different values with one unit that may be categories, such as 3-room
_SHARE = 0.9  # of the rows that decides about a column

_CURRENCY = "[$¢£¤¥\u20a0-\u20cf]"
_CODE = "USD|EUR|GBP|CHF|JPY|CNY|INR|CAD|AUD|NZD|SEK|NOK|DKK|PLN|CZK|BRL"
_NUMBER = (  # with thousands separators, or without
    r"(?:\d{1,3}(?:[.,'\u2019_\s]\d{2,3})*[.,'\u2019_\s]\d{3}(?:[.,]\d+)?"
    r"|\d+(?:[.,]\d*)?|[.,]\d+)(?:[eE][-+]?\d+)?"
)
_SIGN = r"[-+\u2212]?"
_SIGNED_NUMBER = re.compile(
    rf"\(?{_SIGN}\s*(?:(?:[A-Z]{{0,3}}{_CURRENCY}|{_CODE})\s*{_SIGN})?{_NUMBER}"
    rf"\s*(?:{_CURRENCY}|{_CODE}|[%‰])?\)?"
)
_TIME = re.compile(r"\d{1,3}:\d{2}(?::\d{2})?(?:[.,]\d+)?(?:\s*[aApP]\.?[mM]\.?)?")
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}(\D.*)?")
_WITH_UNIT = re.compile(
    rf"{_SIGN}{_NUMBER}\s*(?!(?:st|nd|rd|th)\b)(?P<unit>[^\W\d_][^\d-]*[23]?|[°µ\"'\u2032\u2033][^\d-]*)"
)
_DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+([eE][-+]?\d+)?")
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+")


def odd_notation(cells: Sequence[str]) -> tuple[int, str] | None:
    """Find the notation of a column whose text is numbers, times or dates.

    It is that of nine tenths of the rows. A number with a unit counts if there are more than ten
    different values with one unit; fewer may be categories.

    Args:
        cells: Cells that are not numbers.

    Returns:
        The first row in the notation, and its name: `decimal comma`, `number`, `time` or `date`;
        or None if the text may be categories.

    Examples:
        >>> odd_notation(["free", *["$60", "$75"] * 9])
        (1, 'number')
        >>> odd_notation(["1,5", "2,25"]), odd_notation(["4x4", "3-room", "1st"])
        ((0, 'decimal comma'), None)
    """
    counts = Counter(cells)
    kinds = {cell: _kind(cell) for cell in counts}
    if sum(counts[cell] for cell, kind in kinds.items() if kind) < _SHARE * len(cells):
        unit = _common_unit(counts, _SHARE * len(cells))
        kinds = {cell: kinds[cell] or ("number" if cell in unit else None) for cell in counts}
        if not unit:
            return None
    if "decimal comma" in kinds.values():  # which tells what 1,500 in another row is
        kinds = {cell: kind for cell, kind in kinds.items() if kind == "decimal comma"}
    return next((row, kind) for row, cell in enumerate(cells) if (kind := kinds.get(cell)))


def has_decimal_comma(cell: str) -> bool:
    """Return whether a cell is a number with a decimal comma, which separates no thousands.

    Examples:
        >>> has_decimal_comma("-1,5"), has_decimal_comma("1,500")
        (True, False)
    """
    return _DECIMAL_COMMA.fullmatch(cell) is not None and _THOUSANDS.fullmatch(cell) is None


def _kind(cell: str) -> str | None:
    if has_decimal_comma(cell):
        return "decimal comma"
    for kind, pattern in (("number", _SIGNED_NUMBER), ("time", _TIME), ("date", _DATE)):
        if pattern.fullmatch(cell):
            return kind
    return None


def _common_unit(counts: Counter[str], least: float) -> set[str]:
    """Return the cells with one unit if they are at least so many rows and have many values."""
    groups: dict[str, set[str]] = {}
    for cell in counts:
        if match := _WITH_UNIT.fullmatch(cell):
            groups.setdefault(match["unit"].strip(), set()).add(cell)
    for group in groups.values():
        if len(group) > _MOST_WITH_UNIT and sum(counts[cell] for cell in group) >= least:
            return group
    return set()
