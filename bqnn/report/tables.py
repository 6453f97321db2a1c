"""Format tables as Markdown and CSV.

Names, settings and errors come from the files of runs, which are untrusted. All text is therefore
escaped, so that it cannot become markup, an image, a link or a formula of a spreadsheet.
"""

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame


def cells(frame: "DataFrame") -> "DataFrame":
    """Convert every value to a string, and drop columns without values.

    Floats get four significant digits, and missing values become empty strings.
    """
    frame = frame.dropna(axis="columns", how="all")
    return frame.astype(object).map(_text)


def markdown(table: "DataFrame") -> str:
    """Format a table of strings as Markdown."""
    head = [str(name) for name in table]
    rows = [[plain(name) for name in head], ["---"] * len(head)]
    rows += [[plain(cell) for cell in row] for row in table.itertuples(index=False, name=None)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


@lru_cache(maxsize=2**15)
def plain(text: str) -> str:
    r"""Escape text so that Markdown shows it literally, in one line.

    Examples:
    >>> plain("![x](https://example.org) *a*_b | <i>")
    '!\\[x\\](https&#58;//example.org) \\*a\\*\\_b \\| &lt;i>'
    """
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    text = re.sub(r"^(\d*)([#+.)=-]+)(?=\s|$)", r"\1\\\2", text)  # no heading, list or rule
    text = text.replace("$", "<span>$</span>")  # two of them are mathematics on GitHub
    # An underscore inside a word needs no escape. An address would become a link.
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\_", text)
    return re.sub(r"(?i)(https?|ftp)://|www\.|(?<=[\w.+-])@", _broken_address, text)


def csv(table: "DataFrame") -> str:
    """Format a table as the content of a CSV file without formulas.

    Spreadsheets evaluate strings that start with =, +, - or @, so these get a leading apostrophe.
    Numbers are unchanged.
    """
    neutral = table.map(_neutral).rename(columns=_neutral)
    return neutral.to_csv(index=False)


def _broken_address(match: "re.Match[str]") -> str:
    return re.sub(r"[:.@]", lambda mark: f"&#{ord(mark[0])};", match[0])


def _neutral(value: object) -> object:
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value


def _text(value: object) -> str:
    import pandas as pd

    if pd.isna(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
