"""The report as one self-contained HTML page, and as Markdown."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bqnn.report.tables import markdown, plain

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass
class Section:
    """A section of the report, with text, figures, a table and subsections.

    Attributes:
        title: The heading.
        level: The level of the heading, 1 to 4.
        text: A paragraph below the heading.
        figures: The caption and the PNG file of each figure.
        table: A table of strings.
        folded: Whether the HTML page shows only the heading until the reader opens the section.
        is_warning: Whether the HTML page highlights the section.
        parts: The subsections.
    """

    title: str
    level: int
    text: str = ""
    figures: Sequence[tuple[str, Path]] = ()
    table: "DataFrame | None" = None
    folded: bool = False
    is_warning: bool = False
    parts: list["Section"] = field(default_factory=list)


def page(report: Section) -> str:
    """Render a report as one HTML document, with escaped text and embedded figures.

    Examples:
        >>> "<h1>a &lt; b</h1>" in page(Section("a < b", level=1))
        True
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(report=report, base64=_base64)


def document(report: Section) -> str:
    r"""Render a report as Markdown, which links to the figures in their folder.

    Examples:
        >>> print(document(Section("bqnn report", level=1, text="2 runs")))
        # bqnn report
        <BLANKLINE>
        2 runs
        <BLANKLINE>
    """
    blocks = [f"{'#' * report.level} {plain(report.title)}"]
    if report.text:
        blocks.append(plain(report.text))
    blocks += [
        f"![{plain(caption)}]({path.parent.name}/{path.name})" for caption, path in report.figures
    ]
    if report.table is not None:
        blocks.append(markdown(report.table).rstrip())
    blocks += [document(part).rstrip() for part in report.parts]
    return "\n\n".join(blocks) + "\n"


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
