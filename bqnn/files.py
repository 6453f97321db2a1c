"""Files that are either whole or not there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` once all went well and vanishes otherwise."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Make `text` all that the file holds."""
    with written_beside(path) as beside:
        beside.write_text(text)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON; NaN and infinity are a ValueError, since JSON has neither."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
