"""Errors name arguments in the library, and keys of the configuration on the command line."""

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import bqnn
from bqnn.arguments import ArgumentError, prefixed, renamed

PACKAGE = Path(bqnn.__file__).parent
LIBRARY = ("arguments.py", "optim.py", "data", "inference", "layers", "methods", "nets", "quant")


@pytest.mark.parametrize(
    ("message", "names", "expected"),
    [
        ("rate=2: below 1", ("rate",), "g.rate=2: below 1"),
        ("a=1, ab=2: set ab", ("a", "ab"), "g.a=1, g.ab=2: set g.ab"),
        ("table='table': two tables", ("table",), "g.table='table': two tables"),
        ("lr: see optimizer.lr, lr", ("optimizer.lr",), "lr: see g.optimizer.lr, lr"),
        ("write 'bits=[3]'", ("bits",), "write 'g.bits=[3]'"),
        (r"x=\\1: no", ("x",), r"g.x=\\1: no"),
        ("nothing", (), "nothing"),
    ],
)
def test_each_name_gets_the_group_and_nothing_else_does(
    message: str, names: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(ArgumentError) as error, prefixed("g"):
        raise ArgumentError(message, *names)
    assert str(error.value) == expected


def test_groups_nest_and_errors_survive_another_process() -> None:
    with pytest.raises(ArgumentError) as error, prefixed("method"), prefixed("optimizer"):
        raise ArgumentError("lr=-1: no", "lr")
    assert str(error.value) == "method.optimizer.lr=-1: no"
    copy = pickle.loads(pickle.dumps(error.value))
    assert (str(copy), copy.names) == (str(error.value), ("method.optimizer.lr",))


def test_a_name_may_become_any_text_and_other_errors_stay_with_non_finite() -> None:
    key = {"state": "init_from=a"}.__getitem__
    with pytest.raises(ArgumentError, match=r"^init_from=a: no$"), renamed(key):
        raise ArgumentError("state: no", "state")
    with pytest.raises(ValueError, match=r"^state: no$"), prefixed("g"):
        raise ValueError("state: no")


def texts(path: Path) -> Iterator[str]:
    """Yield all strings of a module except docstrings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            yield str(node.value)


@pytest.mark.parametrize("room", LIBRARY)
def test_the_library_knows_no_groups_of_the_configuration(room: str) -> None:
    place = PACKAGE / room
    for path in [place] if place.is_file() else place.rglob("*.py"):
        for text in texts(path):
            found = re.search(r"\b(method|task|quant|trainer)\.[a-z_]", text)
            assert found is None, f"{path}: {text!r}"
