"""Report on all runs below folders: bqnn report, or python -m bqnn.report."""

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bqnn.files import write_text
from bqnn.jobs.terminal import protect_output
from bqnn.report.runs import Runs, read_runs
from bqnn.text import one_line, printable

if TYPE_CHECKING:
    from bqnn.report.page import Section


def main(arguments: Sequence[str], program: str = "python -m bqnn.report") -> str | None:
    """Write the report.

    Args:
        arguments: The command line, without the name of the program.
        program: The name of the program, for its help.

    Returns:
        None, or an error message of one line.
    """
    parser = argparse.ArgumentParser(program, description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with runs at any depth")
    parser.add_argument("--out", type=Path, default=Path("outputs/report"), help="%(default)s")
    options = parser.parse_args(arguments)
    try:
        with _no_collection():
            runs = read_runs(options.folders)
    except FileNotFoundError as error:
        return str(error)
    if runs.runs.empty and not runs.problems:
        names = printable(" ".join(map(str, options.folders)))
        return f"{names}: no runs found (metrics.json, config.yaml); give folders with runs"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        report = write(runs, options.out)
    except OSError as error:
        if error.strerror is None:
            return one_line(str(error))
        out = printable(str(options.out))
        return f"--out {out}: {one_line(error.strerror)}; choose a folder that is writable"
    print(f"{report.text}\n{options.out / 'index.html'}")
    return None


def write(runs: Runs, out: Path) -> "Section":
    """Write the tables (CSV), the figures (plots/), report.md and index.html into a folder.

    Args:
        runs: The runs, from `read_runs`.
        out: An existing folder.

    Returns:
        The report.

    Raises:
        OSError: A file cannot be written.
    """
    from bqnn.report.contents import contents
    from bqnn.report.page import document, page
    from bqnn.report.tables import csv

    report, tables = contents(runs, out / "plots")
    for name, table in tables.items():
        write_text(out / f"{name}.csv", csv(table))
    write_text(out / "report.md", document(report))
    write_text(out / "index.html", page(report))
    return report


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from searching what is read, which is all used, for garbage again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


if __name__ == "__main__":
    protect_output()
    sys.exit(main(sys.argv[1:]))
