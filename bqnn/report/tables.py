"""Tables as text: the cells that a reader sees, in Markdown, in HTML and in CSV files.

Names, settings and errors come from the files of runs, which may be anybody's. So whatever is
shown is escaped: no text becomes markup, an image or a link, or a spreadsheet's formula.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame


def cells(frame: "DataFrame") -> "DataFrame":
    """Every value as text: four significant digits, and nothing where there is no value.

    Columns without any value are left out.
    """
    frame = frame.dropna(axis="columns", how="all")
    return frame.astype(object).map(_text)


def markdown(table: "DataFrame") -> str:
    """A table of texts in Markdown."""
    head = [str(name) for name in table]
    rows = [[plain(name) for name in head], ["---"] * len(head)]
    rows += [[plain(cell) for cell in row] for row in table.itertuples(index=False, name=None)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def plain(text: str) -> str:
    r"""A text that Markdown shows as it is, in one line.

    >>> plain("![x](https://example.org) *a*_b | <i>")
    '!\\[x\\](https&#58;//example.org) \\*a\\*\\_b \\| &lt;i>'
    """
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    text = re.sub(r"^(\d*)([#+.)=-]+)(?=\s|$)", r"\1\\\2", text)  # a heading, a list, a rule
    text = text.replace("$", "<span>$</span>")  # two of them would be mathematics on GitHub
    # An underscore inside a word marks nothing; an address becomes a link by itself.
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\_", text)
    return re.sub(r"(?i)(https?|ftp)://|www\.|(?<=[\w.+-])@", _broken_address, text)


def csv(table: "DataFrame") -> str:
    """A table as the content of a CSV file, in which no text starts like a formula.

    Spreadsheets compute what starts with =, +, - or @; such a text gets an apostrophe in front.
    Numbers stay as they are.
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
