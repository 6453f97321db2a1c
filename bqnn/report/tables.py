"""Tables as text: the cells that a reader sees, in Markdown and in HTML."""

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

LONG = 60  # characters beyond which a cell may be broken into lines


def cells(frame: "DataFrame") -> "DataFrame":
    """Every value as text: four significant digits, and nothing where there is no value.

    Columns without any value are left out.
    """
    frame = frame.dropna(axis="columns", how="all")
    return frame.astype(object).map(_text)


def markdown(table: "DataFrame") -> str:
    """A table of texts in Markdown."""
    head = [str(name) for name in table]
    rows = [head, ["---"] * len(head), *table.itertuples(index=False, name=None)]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows) + "\n"


def html(table: "DataFrame") -> str:
    """A table of texts in HTML, everything in it escaped; page.html makes it sortable."""
    head = "".join(
        f'<th scope="col"><button type="button">{escape(str(name))}</button></th>' for name in table
    )
    rows = "\n".join(
        "<tr>" + "".join(_cell(text) for text in row) + "</tr>"
        for row in table.itertuples(index=False, name=None)
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _cell(text: str) -> str:
    kind = ' class="long"' if len(text) > LONG else ""
    return f"<td{kind}>{escape(text)}</td>"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _text(value: object) -> str:
    import pandas as pd

    if pd.isna(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
