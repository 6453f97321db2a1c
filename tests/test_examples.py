"""The examples of all docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "bqnn").rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module_hold(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = importlib.import_module(module)
    monkeypatch.chdir(ROOT)  # some read README.md
    found = doctest.testmod(imported, verbose=False)
    assert found.attempted > 0
    assert found.failed == 0
