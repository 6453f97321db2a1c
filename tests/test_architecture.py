"""Imports point one way, and heavy packages are imported only when they are needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "bqnn"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What a part of the package may import of ours.
ALLOWED = {
    "layers": {"layers"},
    "nets": {"nets", "layers.markers"},
    "methods": {
        "methods",
        "layers",
        "likelihoods",
        "predict",
        "optim",
        "checkpoint",
        "epochs",
        "seeds",
    },
    "data": {"data", "files", "text", "seeds"},
    "quant": {"quant", "layers", "text", "seeds"},
    "optim": set(),
    "metrics": set(),
    "files": set(),
    "detection": set(),
    "likelihoods": {"metrics"},
    "predict": {"layers", "precision", "seeds"},
    "precision": set(),
    "seeds": set(),
    "plots": {"metrics", "style"},
    "style": {"files"},
    "report": {"report", "files", "style", "status", "records", "terminal", "text"},
    "suite": {"data", "methods", "likelihoods", "metrics", "detection"},
    "suite_results": {"suite", "data", "likelihoods", "plots", "files", "results"},
    "options": {"schema", "text"},
    "secrets": {"options"},
    "locate": set(),
    "choices": {
        *("data", "methods", "nets", "optim", "options", "quant", "recipe", "schema", "text"),
    },
    "schema": {"text", "quant.spec"},
    "text": set(),
    "records": {"files", "text"},
    "archive": {"text"},
    "terminal": {"secrets", "text"},
    "ranks": set(),
    "epochs": set(),
    "status": {"records", "terminal", "text"},
    "run": {"files", "ranks", "secrets", "status", "terminal", "text"},
    "sweep": {"files", "records", "status", "terminal", "text"},
    "config": {
        *("files", "secrets", "run", "status", "sweep", "terminal", "text"),
        *("locate", "options", "quant.spec", "ranks", "records"),
    },
    "checkpoint": {
        *("archive", "epochs", "files", "locate", "records", "schema", "status", "text"),
    },
    "tracking": {"text"},
    "progress": {"methods", "epochs"},
    "isolation": {"run"},
}


# On top of the others; __init__ is empty.
ALL_ALLOWED = {"__init__", "recipe", "results", "trainer", "loggers"}


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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if part in ALL_ALLOWED:
        return
    for name in imports(path):
        if name.startswith("bqnn."):
            ours = name.removeprefix("bqnn.")
            assert any(ours == ok or ours.startswith(f"{ok}.") for ok in ALLOWED[part]), (
                f"{part} must not import {name}"
            )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_some_packages_are_known_in_one_place_only(path: Path) -> None:
    own = str(path.relative_to(PACKAGE))
    for name in imports(path):
        if name.split(".")[0] in ("hydra", "omegaconf"):
            assert own == "config.py", f"{own} imports {name}"
        if name.startswith("torch.ao"):
            assert own == "quant/fbgemm.py", f"{own} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_quantized_operators_are_called_in_one_place_only(path: Path) -> None:
    for word in ("torch.ops.quantized", "torch.ao"):
        if word in path.read_text():
            assert str(path.relative_to(PACKAGE)) == "quant/fbgemm.py", word


ROOT = PACKAGE.parent


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
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
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
