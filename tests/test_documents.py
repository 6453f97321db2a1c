"""The documentation builds, and the examples of its pages and of examples/ run."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT

BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = (
    "index",
    "quantize_model",
    "serving",
    "export",
)  # tests/test_own_pages.py runs the own_*.md
SHORT = ["trainer.max_epochs=1", "logger=none", "plots=false", "method.num_samples=2"]
EXAMPLES = [  # tests/test_web_service.py runs the service
    path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "web_service"
]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = ["-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "kl_divergence" in reference


def test_the_reference_has_all_public_names() -> None:
    import bqnn

    listed = re.findall(r"^::: bqnn\.(\w+)$", (ROOT / "docs/api/index.md").read_text(), re.M)
    assert sorted(listed) == sorted(bqnn.__all__)


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run_in_their_order(
    page: str,
    program_here: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if page == "export":
        pytest.importorskip("onnxruntime")
    namespace: dict[str, Any] = {"__name__": page}
    blocks = BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text())
    assert blocks
    for language, text in blocks:
        if language == "python":
            exec(compile(text, f"{page}.md", "exec"), namespace)
            continue
        for line in text.splitlines():
            program, verb, *arguments = shlex.split(line, comments=True)
            assert program == "bqnn"
            if verb == "report":
                continue  # tests/report runs it
            short = {"train": SHORT, "export": []}.get(verb, ["logger=none", "plots=false"])
            code, errors = program_here(verb, *arguments, *short)
            assert code == 0, errors


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
