"""The public names of bqnn are few, documented, and imported lazily."""

import inspect
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import bqnn

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", bqnn.__all__)
def test_a_public_name_has_a_docstring_with_an_example(name: str) -> None:
    documented = inspect.getdoc(getattr(bqnn, name))
    assert documented is not None
    assert ">>> " in documented


def test_all_names_are_listed_once_for_type_checkers_too() -> None:
    checked = {
        line.rpartition(" as ")[2]
        for line in Path(bqnn.__file__).read_text().splitlines()
        if line.startswith("    from bqnn.")
    }
    assert checked == set(bqnn.__all__)
    assert {*bqnn.__all__, "__version__"} <= set(dir(bqnn))


def test_the_version_is_that_of_the_installed_package() -> None:
    assert bqnn.__version__ == version("bqnn")


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'bqnn' has no attribute 'to_bayse'"):
        bqnn.to_bayse  # type: ignore[attr-defined]  # noqa: B018


def test_importing_bqnn_imports_nothing_heavy() -> None:
    code = "import bqnn, sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not set(result.stdout.split()) & {"torch", "pytorch_lightning", "numpy", "hydra"}
