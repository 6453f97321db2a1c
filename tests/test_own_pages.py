"""The files, tests and commands on the pages about plug-ins work."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bqnn
from tests.running import ROOT

PAGES = [ROOT / "docs" / f"own_{name}.md" for name in ("network", "method", "data")]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORT = ["trainer.max_epochs=1", "logger=none", "plots=false", "method.num_samples=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with the files of all pages, each named in its first line."""
    folder = tmp_path_factory.mktemp("pages")
    for page in PAGES:
        for _, text in BLOCK.findall(page.read_text()):
            if match := re.match(r"# (\S+\.(?:py|yaml))\n", text):
                path = folder / match[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    return folder


def test_the_files_of_the_pages_pass_the_contracts(folder: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 20


def commands() -> list[str]:
    texts = [page.read_text() for page in PAGES]
    shells = [text for page in texts for kind, text in BLOCK.findall(page) if kind == "sh"]
    return [line for text in shells for line in text.splitlines()]


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_pages_run(
    command: str,
    folder: Path,
    script_here: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    program, verb, *arguments = shlex.split(command)
    assert program == "bqnn"
    monkeypatch.syspath_prepend(str(folder))
    (tmp_path / "conf").symlink_to(folder / "conf")
    code, errors = script_here(verb, *arguments, *SHORT, "hydra.run.dir=run")
    assert code == 0, errors
    assert (tmp_path / "run" / "checkpoint.ckpt").exists()
    if "task._target_=my_data.TwoMoons" in arguments:
        answer = bqnn.load(tmp_path / "run", trust=True).predict([[0.0, 1.0], [1.0, -0.5]])
        assert len(answer.entropy) == 2
