"""Fixtures that run the scripts, and small trained networks."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.running import ROOT, kept_logging, run_script

_VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
_GPU_IS_AVAILABLE = torch.cuda.is_available


@pytest.fixture(scope="session", autouse=True)
def _hidden_gpus() -> Iterator[None]:
    """Run all tests and their subprocesses on the CPU, on which results are bit-equal.

    Tests that use `visible_gpus` are the exception.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def visible_gpus(_hidden_gpus: None) -> Iterator[None]:
    """Make the GPUs visible that this process was started with."""
    with pytest.MonkeyPatch.context() as patch:
        if _VISIBLE is None:
            patch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            patch.setenv("CUDA_VISIBLE_DEVICES", _VISIBLE)
        patch.setattr(torch.cuda, "is_available", _GPU_IS_AVAILABLE)
        yield


@pytest.fixture(autouse=True)
def _away_from_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def fresh_compiler() -> None:
    """Forget what torch.compile has compiled in other tests."""
    torch.compiler.reset()


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python <name>.py *arguments` in an empty folder, in a process of its own."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / f"{name}.py"), *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ), timeout=300
        )

    return run


@pytest.fixture
def script_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run a script in this process, which saves the imports; return exit code and stderr."""

    def run(name: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        try:
            run_script(name, *arguments)
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
                return 1, capsys.readouterr().err
            return int(stop.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


@pytest.fixture
def program_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run `bqnn *arguments` in this process: the exit code and stderr."""
    from bqnn.__main__ import main

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["bqnn", *arguments])
        capsys.readouterr()
        try:
            with kept_logging():
                code = main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train short float runs on digits in one folder: one per method, and two of pointwise."""
    from bqnn.methods import METHODS

    folder = tmp_path_factory.mktemp("float")
    for method in METHODS:
        arguments = [f"method={method}", "trainer.max_epochs=3", "logger=none", "plots=false"]
        arguments += [] if method == "pointwise" else ["method.num_samples=3"]
        if method == "sghmc":
            arguments += ["method.burn_in=1", "method.collect_every=1"]
        for seed in (0, 1) if method == "pointwise" else (0,):
            run = [*arguments, f"seed={seed}", f"hydra.run.dir={folder}/{method}_{seed}"]
            run_script("train", *run)
    return folder


@pytest.fixture(scope="session")
def quantized(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrate the short run of bbb with quantize.py for 4-bit weights."""
    folder = tmp_path_factory.mktemp("quantized") / "run"
    arguments = [f"checkpoint={trained}/bbb_0/checkpoint.ckpt", "quant.mode=ptq", "logger=none"]
    run_script("quantize", *arguments, "quant.weight_bits=4", f"hydra.run.dir={folder}")
    return folder
