"""Read a CSV file as text, in columns."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import logging
from dataclasses import dataclass
from pathlib import Path

from bqnn.files import open_regular
from bqnn.text import counted, one_line, printable, short

log = logging.getLogger(__name__)

_SEPARATORS = ",;\t|"
_LONGEST_NAME = 200  # characters
_START = 2**24  # bytes that have the names of the columns
_OTHER_FORMATS = {
    b"\x1f\x8b": "is compressed; unpack it (gunzip)",
    b"BZh": "is compressed; unpack it (bunzip2)",
    b"\xfd7zXZ": "is compressed; unpack it (unxz)",
    b"\x28\xb5\x2f\xfd": "is compressed; unpack it (unzstd)",
    b"PK\x03\x04": "is an Excel file or a zip archive; save it as CSV, or unpack it",
    b"\xd0\xcf\x11\xe0": "is an Excel file; save it as CSV",
    b"PAR1": "is a Parquet file; convert it with pandas.read_parquet(...).to_csv(..., index=False)",
    b"ARROW1": "is a Feather file; convert it with pandas.read_feather(...).to_csv(...)",
}


@dataclass(frozen=True, eq=False)
class CSVFile:
    """The cells of a CSV file.

    Attributes:
        path: The file.
        columns: The cells of each column, without surrounding white space, by the column's name.
        lines: The line of each row in the file, from 1.
        sha256: The hash of the file.
        counted: What `lines` counts, for error messages.
    """

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]
    sha256: str
    counted: str = "line"

    @property
    def where(self) -> str:
        """The path, for error messages."""
        return printable(str(self.path))

    def place(self, row: int, name: str) -> str:
        """Describe a cell for an error message: its file, line, column and content."""
        return f"{self.row(row)}, column {short(name)} has {short(self.columns[name][row])}"

    def row(self, row: int) -> str:
        """Describe a row for an error message: its file and line."""
        return f"{self.where}: {self.counted} {self.lines[row]}"

    def take(self, rows: list[int]) -> CSVFile:
        """Return the rows with these indices."""
        columns = {name: [cells[row] for row in rows] for name, cells in self.columns.items()}
        return CSVFile(self.path, columns, [self.lines[row] for row in rows], self.sha256)


def read_csv(path: Path) -> CSVFile:
    """Read a CSV file whose first line has the names of the columns.

    Columns are separated by commas, semicolons, tabs or `|`, whichever occurs most often in
    the first line. The text is UTF-8, or UTF-16 with a byte order mark. Empty lines and columns
    without a name are left out.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a table with unique names and rows of equal lengths. The message
            names the file and the line.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "flats.csv")
        ...     size = path.write_text("area;city\\n70,5;Ghent\\n\\n62;Aalst\\n")
        ...     file = read_csv(path)
        >>> file.columns, file.lines
        ({'area': ['70,5', '62'], 'city': ['Ghent', 'Aalst']}, [2, 4])
    """
    where = printable(str(path))
    content = _content(path, where)
    rows, lines = _rows(_text(content, where), where)
    names = _names(rows, lines, where)
    if num_unnamed := names.count(""):
        log.warning("%s: columns without a name are left out (%d)", where, num_unnamed)
    for row, line in zip(rows[1:], lines[1:], strict=True):
        if len(row) != len(names):
            raise ValueError(
                f"{where}: line {line} has {counted(len(row), 'cell')}, but line {lines[0]} names "
                f"{counted(len(names), 'column')}; correct the line, and quote text that "
                "has a separator"
            )
    cells = zip(*rows[1:], strict=True) if len(rows) > 1 else iter([()] * len(names))
    columns = {name: list(column) for name, column in zip(names, cells, strict=True) if name}
    return CSVFile(path, columns, lines[1:], hashlib.sha256(content).hexdigest())


def read_names(path: Path) -> CSVFile:
    """Read the names of the columns of a CSV file, without its rows.

    Args:
        path: The file.

    Returns:
        The columns, without cells.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The first line has no names of columns.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "flats.csv")
        ...     size = path.write_text("area;city\\n70,5;Ghent\\n")
        ...     read_names(path).columns
        {'area': [], 'city': []}
    """
    where = printable(str(path))
    text = _text(_content(path, where, _START), where, is_whole=False)
    rows, lines = _rows(text, where, most=1)
    return CSVFile(path, {name: [] for name in _names(rows, lines, where) if name}, [], sha256="")


def _content(path: Path, where: str, most: int = -1) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(most)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no file {where}: give the path of a CSV file, from the working directory"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(str(error))
        raise ValueError(f"{where} cannot be read ({reason}); give a CSV file") from error


def _text(content: bytes, where: str, is_whole: bool = True) -> str:
    for start, refusal in _OTHER_FORMATS.items():
        if content.startswith(start):
            raise ValueError(f"{where} {refusal}")
    is_utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    decoder = codecs.getincrementaldecoder("utf-16" if is_utf_16 else "utf-8-sig")()
    try:
        text = decoder.decode(content, final=is_whole)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{where}: line {line} is not UTF-8; save the file as UTF-8 (iconv -f latin1 -t utf-8)"
        ) from None
    if "\0" in text:
        raise ValueError(f"{where} is not a text file; save it as CSV in UTF-8")
    return text


def _rows(text: str, where: str, most: int | None = None) -> tuple[list[list[str]], list[int]]:
    """Split text into rows of cells, at most so many, and return the line of each."""
    first = next((line for line in io.StringIO(text) if line.strip()), "")
    separator = max(_SEPARATORS, key=first.count)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
    )
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                rows.append(cells)
                lines.append(reader.line_num)
            if len(rows) == most:
                break
    except csv.Error as error:
        raise ValueError(
            f"{where}: line {reader.line_num} cannot be split into cells ({one_line(str(error))}); "
            "close each quote, and double the quotes inside of quoted text"
        ) from error
    return rows, lines


def _names(rows: list[list[str]], lines: list[int], where: str) -> list[str]:
    """Return the first row, which names the columns."""
    if not rows:
        raise ValueError(f"{where} is empty; give a CSV file with a line of names and rows")
    names = rows[0]
    if all(map(_is_number, names)) and names != [str(number) for number in range(len(names))]:
        raise ValueError(
            f"{where}: line {lines[0]} has only numbers; add a line with the names of the columns "
            "before it"
        )
    _check_names(names, f"{where}: line {lines[0]}")
    return names


def _check_names(names: list[str], where: str) -> None:
    seen = set()
    for name in filter(None, names):
        if len(name) > _LONGEST_NAME:
            raise ValueError(
                f"{where} has a name of {len(name)} characters; add a line with the names of the "
                f"columns, of at most {_LONGEST_NAME} characters each"
            )
        if name in seen:
            raise ValueError(f"{where} has the name {short(name)} twice; rename one of the columns")
        seen.add(name)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
