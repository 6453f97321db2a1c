"""Imports follow the table of rooms, and heavy packages are imported lazily."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bqnn"
MODULES = sorted(PACKAGE.rglob("*.py"))


def read_rooms() -> dict[str, tuple[int, set[str]]]:
    """Read docs/architecture.md: the floor of each room, and what it may import."""
    rooms = {}
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        if match := re.fullmatch(r"\| (\d) \| `(\w+)` \| [^|]+ \| ?([^|]*) ?\|", line):
            rooms[match[2]] = (int(match[1]), set(re.findall(r"`(\w+)`", match[3])))
    rooms["commands"] = (rooms["commands"][0], set(rooms) - {"commands"})
    return rooms


ROOMS = read_rooms()
HYDRA = ("jobs/launch.py", "jobs/command_line/")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_a_wheel_has_every_package_and_the_configuration() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py")}
    assert set(setuptools["packages"]) == {".".join(f.parts) for f in folders} | {"bqnn.conf"}
    patterns = setuptools["package-data"]["bqnn.conf"]
    files = {path for pattern in patterns for path in (ROOT / "conf").glob(pattern)}
    assert files == set((ROOT / "conf").rglob("*.yaml"))


def test_the_table_has_every_room() -> None:
    assert {room_of(path) for path in MODULES} - {"__init__", "__main__"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_may_import_from_those_below_it(room: str) -> None:
    floor, allowed = ROOMS[room]
    assert all(ROOMS[name][0] < floor for name in allowed)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_table_allows(room: str) -> None:
    seen = {
        name.split(".")[1]
        for path in MODULES
        if room_of(path) == room
        for name in imports(path)
        if name.startswith("bqnn.")
    }
    _, allowed = ROOMS[room]
    assert seen - {room} <= allowed
    if room != "commands":
        assert allowed <= seen


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_some_packages_are_known_in_one_place_only(path: Path) -> None:
    own = str(path.relative_to(PACKAGE))
    for name in imports(path):
        if name.split(".")[0] in ("hydra", "omegaconf"):
            assert own.startswith(HYDRA), f"{own} imports {name}"
        assert name.split(".")[:2] != ["torch", "ao"], f"{own} imports {name}, which is deprecated"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_quantized_operators_are_called_in_one_place_only(path: Path) -> None:
    if "torch.ops.quantized" in path.read_text():
        assert str(path.relative_to(PACKAGE)) == "quant/engines/fbgemm.py"


@pytest.mark.parametrize(
    "path",
    [*MODULES, *ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_are_opened_as_data(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called, options = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        assert not called.startswith(("pickle.", "joblib.load", "torch.jit.load")), called
        assert called not in ("eval", "exec", "yaml.unsafe_load"), called
        if called == "yaml.load":  # the safe loader in C, which safe_load does not take
            assert "SafeLoader" in ast.unparse(node.args[1]), ast.unparse(node)
        assert not called.endswith("load_from_checkpoint"), called
        if called == "torch.load" or "ckpt_path" in options:  # the latter: a Trainer opens it
            safe = options.get("weights_only")
            assert safe is not None, f"{called} without weights_only=True"
            assert ast.literal_eval(safe) is True, f"{called} without weights_only=True"
        if called in ("np.load", "numpy.load"):
            pickled = options.get("allow_pickle")
            assert pickled is None or not ast.literal_eval(pickled), "np.load of pickles"


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(result.stdout.split())


def test_a_mistake_on_the_command_line_does_not_wait_for_torch() -> None:
    assert not loaded_by("import train, quantize, evaluate") & {
        "torch",
        "pytorch_lightning",
        "numpy",
    }


def test_a_report_needs_no_torch_and_the_rest_only_when_it_is_made() -> None:
    loaded = loaded_by("import bqnn.report.contents, bqnn.report.__main__")
    assert not loaded & {"torch", "pandas", "matplotlib", "scipy", "numpy"}


def test_training_imports_heavy_packages_only_when_used() -> None:
    loaded = loaded_by(
        "import bqnn.checkpoints.recipe, bqnn.training.trainer, bqnn.training.loggers, "
        "bqnn.evaluation.figures, bqnn.commands.train, bqnn.commands.quantize, "
        "bqnn.commands.evaluate"
    )
    assert "torch" in loaded
    needed_anyway = loaded_by("import pytorch_lightning, torchmetrics")  # and what is installed
    heavy = {"wandb", "sklearn", "pandas", "matplotlib"} - needed_anyway
    assert not loaded & heavy
