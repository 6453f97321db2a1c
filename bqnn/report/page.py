"""One HTML page that needs nothing but itself: sections, tables, pictures inside."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from bqnn.report.tables import html, markdown, plain

if TYPE_CHECKING:
    from pandas import DataFrame

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass
class Section:
    """A part of the report: what is said, pictures, a table of texts, and parts of its own.

    level: that of its heading, 1 to 4; a folded section is opened by its reader.
    """

    title: str
    level: int
    text: str = ""
    pictures: Sequence[tuple[str, Path]] = ()  # what a picture shows, and its file
    table: "DataFrame | None" = None
    folded: bool = False
    is_warning: bool = False
    parts: list["Section"] = field(default_factory=list)


def page(report: Section) -> str:
    """The report as one HTML document, all of its text escaped and its pictures inside."""
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=escape(report.title), body=_html(report))


def document(report: Section) -> str:
    """The report in Markdown, its pictures in the folder that they are in beside it."""
    blocks = [f"{'#' * report.level} {plain(report.title)}"]
    if report.text:
        blocks.append(plain(report.text))
    blocks += [
        f"![{plain(shows)}]({path.parent.name}/{path.name})" for shows, path in report.pictures
    ]
    if report.table is not None:
        blocks.append(markdown(report.table).rstrip())
    blocks += [document(part).rstrip() for part in report.parts]
    return "\n\n".join(blocks) + "\n"


def _html(section: Section) -> str:
    title = escape(section.title)
    inside = [f"<p>{escape(section.text)}</p>"] if section.text else []
    if section.pictures:
        wide = " wide" if len(section.pictures) == 1 else ""
        pictures = "\n".join(_picture(shows, path) for shows, path in section.pictures)
        inside.append(f'<div class="pictures{wide}">\n{pictures}\n</div>')
    if section.table is not None:
        inside.append(html(section.table))
    inside += [_html(part) for part in section.parts]
    content = "\n".join(inside)
    if section.folded:
        return f"<details>\n<summary>{title}</summary>\n{content}\n</details>"
    kind = ' class="warning"' if section.is_warning else ""
    return f"<section{kind}>\n<h{section.level}>{title}</h{section.level}>\n{content}\n</section>"


def _picture(shows: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(shows)}" src="data:image/png;base64,{data}">'
