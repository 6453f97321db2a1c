"""Versions and commits of Runs, with and without an installation."""

import subprocess
import sys
from pathlib import Path

from bqnn.jobs import provenance
from tests.running import ROOT

CODE = """
import json
from bqnn.jobs.provenance import git_commit, versions
print(json.dumps([versions()["bqnn"], git_commit()]))
"""


def test_code_that_is_not_installed_has_no_version() -> None:
    assert provenance._version("bqnn-of-nowhere") == "not installed"


def test_the_commit_of_a_repository_around_the_package_is_not_its_own(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    packages = tmp_path / "env" / "packages"
    packages.mkdir(parents=True)
    copy = packages / "copy" / "bqnn" / "jobs"
    copy.mkdir(parents=True)
    for name in ("__init__", "text"):
        source = ROOT / "bqnn" / f"{name}.py"
        (packages / "copy" / "bqnn" / f"{name}.py").write_text(source.read_text())
    for name in ("__init__", "provenance"):
        (copy / f"{name}.py").write_text((ROOT / "bqnn" / "jobs" / f"{name}.py").read_text())
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=packages / "copy",
        capture_output=True,
        text=True,
        check=True,
    )
    assert '", null]' in done.stdout
