"""The wheel works outside of a checkout, as a tool and as a library."""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("bqnn", "conf", "pyproject.toml", "README.md", "LICENSE")
API = """
import sys
import numpy as np, torch, torchvision
import bqnn

assert bqnn.__file__.startswith(sys.prefix), bqnn.__file__
net = bqnn.to_bayes(torchvision.models.resnet18(num_classes=10), prior_std=0.1, init_rho=-5.0)
samples = bqnn.predictive(net.eval(), torch.zeros(2, 3, 32, 32), num_samples=3)
assert samples.shape == (3, 2, 10)
batches = [torch.randn(4, 3, 32, 32)]
integer = bqnn.quantize(net, batches, bqnn.QuantSpec(weight_bits=4))
assert bqnn.predictive(integer, batches[0], num_samples=2).shape == (2, 4, 10)
model = bqnn.load("q/checkpoint.ckpt", numeric="int8")
answer = model.predict(np.zeros((4, 1, 8, 8), "uint8"), num_samples=5)
assert answer.probabilities.shape == (4, 10) and answer.mutual_information.shape == (4,)
"""


@dataclass
class Installed:
    """A virtual environment with the wheel, and an empty folder to work in."""

    wheel: Path
    environment: Path
    folder: Path

    def run(self, *command: str, code: int = 0) -> str:
        """Run a command of the environment, and return what it printed."""
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        variables = {key: value for key, value in os.environ.items() if key not in hidden}
        variables["PATH"] = f"{self.environment / 'bin'}{os.pathsep}{variables['PATH']}"
        program = str(self.environment / "bin" / command[0])
        result = subprocess.run(
            [program, *command[1:]],
            cwd=self.folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == code, result.stderr
        return result.stdout + result.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build the wheel and install it, without a network, beside the packages of this environment.

    Those are visible through a .pth file, in which that of an editable bqnn has no effect.
    """
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name)
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, *build, str(folder / "source")], check=True)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("\n".join(others))
    install = [
        "--python",
        str(environment / "bin" / "python"),
        "install",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, *install, str(wheel)], check=True)
    (folder / "work").mkdir()
    return Installed(wheel, environment, folder / "work")


def test_the_wheel_has_the_configuration_and_the_mark_of_types(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    configuration = [path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml")]
    assert {f"bqnn/{path.as_posix()}" for path in configuration} <= names
    assert {"bqnn/py.typed", "bqnn/data/uci_sha256.txt", "bqnn/report/page.html"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"bqnn"}


def test_the_installed_tool_trains_quantizes_evaluates_and_reports(installed: Installed) -> None:
    assert "quantize" in installed.run("bqnn", "--help")
    quick = ["logger=none", "plots=false"]
    train = ["method=bbb", "task=digits", "trainer=smoke", "method.num_samples=2"]
    installed.run("bqnn", "train", *train, *quick)
    (run,) = (installed.folder / "outputs" / "train").iterdir()
    quantize = [f"checkpoint={run}", "quant.mode=ptq", "hydra.run.dir=q", "num_samples=2"]
    installed.run("bqnn", "quantize", *quantize, *quick)
    installed.run("bqnn", "evaluate", "checkpoint=q", "suite=test", "numeric=int8", *quick)
    installed.run("bqnn", "report", "outputs", "q")
    assert (installed.folder / "outputs" / "report" / "index.html").exists()
    assert "train one (bqnn train)" in installed.run("bqnn", "evaluate", "checkpoint=x", code=1)
    installed.run("python", "-c", API)


@pytest.mark.slow
def test_a_sweep_in_many_processes_finds_choices_of_the_user(installed: Installed) -> None:
    choice = installed.folder / "mine" / "method" / "wide.yaml"
    choice.parent.mkdir(parents=True)
    choice.write_text("defaults: [bbb]\nprior_std: 0.7\n")
    sweep = ["-m", "--config-dir", "mine", "method=wide,pointwise", "trainer=smoke", "logger=none"]
    launcher = ["plots=false", "hydra/launcher=joblib", "hydra.sweep.dir=sweep"]
    installed.run("bqnn", "train", *sweep, *launcher)
    configurations = (installed.folder / "sweep").glob("*/config.yaml")
    assert sum("prior_std: 0.7" in path.read_text() for path in configurations) == 1


@pytest.mark.slow
def test_several_processes_train_one_model(installed: Installed) -> None:
    arguments = ["task=digits", "method=pointwise", "trainer=ddp", "trainer.max_epochs=1"]
    cpu = ["trainer.accelerator=cpu", "logger=none", "plots=false", "hydra.run.dir=ddp"]
    installed.run("bqnn", "train", *arguments, *cpu)
    assert '"DONE"' in (installed.folder / "ddp" / "status.json").read_text()
