"""A run that is killed at any time and resumed is bit-equal to an uninterrupted one."""

import json
import multiprocessing
import os
import random
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bqnn.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
ScriptHere = Callable[..., tuple[int, str]]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "bqnn.checkpoints.recipe",
        "bqnn.commands.train",
        "bqnn.commands.quantize",
    ]
)

# Ensemble members, a schedule, a growing beta, a best epoch, and validations between epochs.
BEST = "trainer.save_best=true"
TRAINING = {
    "pointwise": ["method=pointwise", BEST],
    "bbb": ["method=bbb", "method.warmup_epochs=12", BEST],
    "mcdropout": ["method=mcdropout", BEST],
    "sghmc": ["method=sghmc", "method.burn_in=8", "method.num_members=3", BEST],
    "ensemble": ["method=ensemble", "method.num_members=3", BEST],
    "swag": ["method=swag", "method.swa_start=0.3", "method.collect_every=2", "method.rank=3"],
    "laplace": ["method=laplace"],
}
COMMON = ["logger=none", "plots=false", "trainer.save_every=0"]
SHORT = ["task=synthetic", "task.num_train=200", "trainer.max_epochs=24"]
SHORT += ["trainer.check_val_every_n_epoch=3", *COMMON]
QAT = ["quant.fine_tuning.max_epochs=12", "quant.freeze_epochs=4", *COMMON]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def run_script(name: str, arguments: list[str], folder: Path) -> None:
    """Run in the process that is killed."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.argv = [f"{name}.py", *arguments]
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")


def kill_at_random(name: str, arguments: list[str], run: Path, seconds: float) -> None:
    """Run a script in a subprocess, and kill it within this time after it claims its folder."""
    process = FORKS.Process(target=run_script, args=(name, arguments, run.parent))
    process.start()
    while not (run / "status.json").exists():
        assert process.is_alive()
        time.sleep(0.002)
    time.sleep(random.uniform(0, seconds))
    process.kill()
    process.join()


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return where two checkpoints differ in a bit, except for progress counters."""
    if isinstance(a, dict):
        keys = (a.keys() | b.keys()) - {"loops"}
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{where}/{k}")]
    if isinstance(a, list | tuple):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{where}/{i}")]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [where]


def assert_bit_equal(run: Path, reference: Path) -> None:
    for name in ("checkpoint.ckpt", "best.ckpt"):
        if (reference / name).exists():
            ours, theirs = (torch.load(f / name, weights_only=True) for f in (run, reference))
            assert differences(ours, theirs) == []
    if (reference / "metrics.csv").exists():
        assert (run / "metrics.csv").read_bytes() == (reference / "metrics.csv").read_bytes()
    ours, theirs = (np.load(folder / "predictions.npz") for folder in (run, reference))
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert quality(run) == quality(reference)
    assert {p.name for p in run.iterdir()} == {p.name for p in reference.iterdir()}


def quality(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if not key.startswith("time/")}


def kill_and_resume(
    name: str,
    arguments: list[str],
    reference: Path,
    folder: Path,
    script_here: ScriptHere,
    times: int,
) -> list[int]:
    """Kill and resume new runs; return the epochs of this many interruptions."""
    described = status(reference)
    start, end = (
        time.mktime(time.strptime(described[k][:19], "%Y-%m-%dT%H:%M:%S")) for k in ("start", "end")
    )
    seconds, attempts = max(end - start, 1.0), 0
    epochs: list[int] = []
    while len(epochs) < times:
        run = folder / f"run{attempts}"
        attempts += 1
        assert attempts < 5 * times + 5
        kill_at_random(name, [*arguments, f"hydra.run.dir={run}"], run, seconds)
        if status(run)["state"] == "DONE":  # it was faster
            seconds *= 0.8
            continue
        code, errors = script_here(name, *arguments, f"hydra.run.dir={run}", "resume=true")
        assert code == 0, errors
        assert status(run)["state"] == "DONE"
        assert_bit_equal(run, reference)
        epochs.append(status(run)["resumed_from_epoch"])
    return epochs


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train each method without interruption."""
    folder = tmp_path_factory.mktemp("references")
    for method, options in TRAINING.items():
        with pytest.MonkeyPatch.context() as patch:
            run = [*options, *SHORT, f"hydra.run.dir={folder}/{method}"]
            patch.setattr(sys, "argv", ["train.py", *run])
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return folder


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_training_ends_as_if_nothing_had_happened(
    method: str, times: int, references: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [*TRAINING[method], *SHORT]
    reference = references / method
    print(kill_and_resume("train", arguments, reference, tmp_path, script_here, times))


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("method", "options"),
    [*((method, []) for method in METHODS), ("bbb", ["quant.activation_observer=histogram"])],
)
def test_a_killed_fine_tuning_ends_as_if_nothing_had_happened(
    method: str,
    options: list[str],
    times: int,
    references: Path,
    script_here: ScriptHere,
    tmp_path: Path,
) -> None:
    arguments = [f"checkpoint={references}/{method}/checkpoint.ckpt", *options, *QAT]
    reference = tmp_path / "reference"
    assert script_here("quantize", *arguments, f"hydra.run.dir={reference}")[0] == 0
    print(kill_and_resume("quantize", arguments, reference, tmp_path, script_here, times))
