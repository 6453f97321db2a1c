"""Run the scripts inside the process of the tests."""

import logging
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_script(name: str, *arguments: str) -> None:
    """Run `python <name>.py *arguments` in this process; a failure is SystemExit."""
    with pytest.MonkeyPatch.context() as patch, kept_logging():
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")


@contextmanager
def kept_logging() -> Iterator[None]:
    """Restore the root logger, whose handlers Hydra replaces for the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
