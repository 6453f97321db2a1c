"""The examples in docstrings print what they show."""

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

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
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # libraries may draw from the global state
    found = doctest.testmod(imported, verbose=False)
    assert found.attempted > 0
    assert found.failed == 0
