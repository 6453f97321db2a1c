"""Another package adds a network, a method and a data set to the command line."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.running import ROOT

PACKAGE = ROOT / "tests" / "plugin_package"
ScriptHere = Callable[..., tuple[int, str]]
SHORT = ["trainer.max_epochs=3", "logger=none", "plots=false", "method.num_samples=3"]
BY_ENTRY_POINT = ["net.name=strips", "method.name=noisy_dropout", "task.dataset=two_moons"]
BY_PATH = [
    *("net._target_=example_plugin.Strips", "method._target_=example_plugin.NoisyDropout"),
    "task._target_=example_plugin.TwoMoons",
]
OPTIONS = ["net.width=8", "method.noise=0.2", "task.num_rows=200"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder of installed packages that contains the package, as pip does."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(PACKAGE / "example_plugin.py", folder)
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    info = folder / f"example_plugin-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))


def outputs(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in found.items() if not name.startswith("time/")}


@pytest.mark.parametrize(
    ("overrides", "names", "label"),
    [
        (BY_ENTRY_POINT, ["strips", "noisy_dropout", "two_moons"], "example_plugin:Strips"),
        (BY_PATH, ["Strips", "NoisyDropout", "TwoMoons"], "example_plugin.Strips"),
    ],
    ids=["entry point", "path"],
)
def test_it_trains_quantizes_evaluates_and_reports(
    overrides: list[str],
    names: list[str],
    label: str,
    installed: None,
    script_here: ScriptHere,
    tmp_path: Path,
) -> None:
    assert script_here("train", *overrides, *OPTIONS, *SHORT, "hydra.run.dir=a")[0] == 0
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert [config[group]["name"] for group in ("net", "method", "task")] == names
    assert (config["net"]["width"], config["method"]["noise"]) == (8, 0.2)

    common = ["logger=none", "plots=false"]
    for verb, options in (("quantize", ["quant.mode=ptq"]), ("evaluate", ["suite=test"])):
        code, errors = script_here(verb, "checkpoint=a", *options, *common, "hydra.run.dir=b")
        assert code == 1
        assert f"its net is '{label}'; opening it would import and run this code" in errors
        assert "add trust=true" in errors
        shutil.rmtree(tmp_path / "b")
    for mode in ("ptq", "qat"):
        options = [f"quant.mode={mode}", "trust=true", f"hydra.run.dir={mode}", *common]
        assert script_here("quantize", "checkpoint=a", *options)[0] == 0
    metrics = outputs(tmp_path / "ptq")
    assert metrics["int8/test/nll"] == pytest.approx(metrics["simulated/test/nll"], abs=1e-6)
    options = ["numeric=int8", "suite=test", "trust=true", "hydra.run.dir=c", *common]
    assert script_here("evaluate", "checkpoint=ptq", *options)[0] == 0
    assert outputs(tmp_path / "c")["int8/test/nll"] == metrics["int8/test/nll"]

    report = [sys.executable, "-m", "bqnn.report", "."]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        report, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "4 runs" in done.stdout
    page = (tmp_path / "outputs" / "report" / "index.html").read_text()
    assert names[1] in page
    assert names[2] in page


def test_the_same_training_by_name_path_and_file_gives_the_same_numbers(
    installed: None, script_here: ScriptHere, tmp_path: Path
) -> None:
    for group, name, target in (
        ("net", "mine", "Strips"),
        ("method", "mine", "NoisyDropout"),
        ("task", "mine", "TwoMoons"),
    ):
        (tmp_path / "conf" / group).mkdir(parents=True)
        own: dict[str, object] = {"defaults": ["own"], "name": name}
        own |= {"_target_": f"example_plugin.{target}"} | ({"width": 8} if group == "net" else {})
        text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in own.items())
        (tmp_path / "conf" / group / "mine.yaml").write_text(text)
    by_file = ["--config-dir", "conf", "net=mine", "method=mine", "task=mine"]
    for folder, overrides in (
        ("name", [*BY_ENTRY_POINT, "net.width=8"]),
        ("path", [*BY_PATH, "net.width=8"]),
        ("file", by_file),
    ):
        code, errors = script_here("train", *overrides, *SHORT, f"hydra.run.dir={folder}")
        assert code == 0, errors
    assert outputs(tmp_path / "name") == outputs(tmp_path / "path") == outputs(tmp_path / "file")


def test_a_sweep_over_networks_of_its_own(
    installed: None, script_here: ScriptHere, tmp_path: Path
) -> None:
    options = ["net._target_=example_plugin.Strips,bqnn.nets.MLP", "task=synthetic", *SHORT]
    code, _ = script_here("train", "-m", *options, "method=pointwise", "hydra.sweep.dir=s")
    assert code == 0
    names = {
        yaml.safe_load(path.read_text())["net"]["name"] for path in tmp_path.glob("s/*/config.yaml")
    }
    assert names == {"Strips", "MLP"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["net._target_=example_plugin.Strip"], "net._target_=example_plugin.Strip: cannot be imp"),
        (["net._target_=example_plugin.TwoMoons"], "it is a class; give the path of a subclass of"),
        (["net.name=stripes"], "net.name='stripes': unknown; did you mean strips? choose one of m"),
        (["net.name=strips", "net.widht=3"], "net.widht: net=strips has no such option; did you"),
        (["net.name=strips", "net.heads=[3]"], "net.heads: net=strips has no such option"),
        (["task.dataset=two_moons", "task.rows=3"], "task.rows: task=two_moons has no such option"),
        (["method.name=noisy_dropout", "method.num_samples=0"], "method.num_samples=0: choose a w"),
        (["method._target_=os.system"], "method._target_=os.system: choose the dotted path of"),
        (["net=own"], "net._target_ is missing; give it on the command line"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_files(
    overrides: list[str], said: str, installed: None, script_here: ScriptHere, tmp_path: Path
) -> None:
    code, errors = script_here("train", *overrides)
    assert code == 1
    assert said in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_its_own_finds_it_on_the_path(
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{site}")
    done = script("train", *BY_ENTRY_POINT, *SHORT, "hydra.run.dir=a")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "checkpoint.ckpt").exists()
