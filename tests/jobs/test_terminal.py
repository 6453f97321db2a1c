"""Failures of printing never end a Job."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bqnn.jobs.terminal import say

ROOT = Path(__file__).resolve().parents[2]
# Prints more than any buffer holds, by all ways, and then does what a job is for.
PROGRAM = """
import logging, sys, warnings
from bqnn.jobs.terminal import protect_output, say
protect_output()
protect_output()
logging.basicConfig()
file = open("file.txt", "w")
for number in range(5000):
    print("\\xe9 \\udce9", number)
    print(number, file=sys.stderr)
say("said")
logging.getLogger().warning("logged")
warnings.warn("warned")
file.write("whole")
file.close()
open("done.txt", "w").close()
"""
NOWHERE = [
    *(">&-", "2>&-", ">&- 2>&- <&-", "| true", "2>&1 | true", ">/dev/full 2>&1"),
]


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize("flags", ["", "-u"])
@pytest.mark.parametrize("nowhere", NOWHERE)
def test_a_program_continues_after_its_output_breaks(
    nowhere: str, flags: str, tmp_path: Path
) -> None:
    if "/dev/full" in nowhere and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "program.py").write_text(PROGRAM)
    program = f"'{sys.executable}' {flags} program.py"
    # The shell tells the exit code of the first command of a pipeline in a file.
    command = f"({program}; echo $? >code.txt) {nowhere}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=60
    )
    assert (tmp_path / "done.txt").exists()
    assert (tmp_path / "file.txt").read_text() == "whole"
    assert (tmp_path / "code.txt").read_text() == "0\n"


class Broken(io.StringIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str, /) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "full"), ValueError("closed")])
def test_broken_streams_are_ignored(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Broken(error), None):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        say("a")
        say("a", error=True)


def test_characters_outside_the_encoding_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    say("é \udce9")
    assert written.getvalue() == b"\\xe9 \\udce9\n"


def test_a_sweep_and_a_report_finish_without_a_reader_of_their_output(tmp_path: Path) -> None:
    def run_unread(*arguments: str) -> int:
        reader, writer = os.pipe()
        os.close(reader)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *arguments]
        try:
            return subprocess.run(
                command, cwd=tmp_path, env=environment, stdout=writer, stderr=writer, timeout=300
            ).returncode
        finally:
            os.close(writer)

    arguments = ["-m", "task=synthetic", "method=pointwise", "trainer=smoke", "plots=false"]
    arguments += ["logger=none", "seed=0,1", "hydra.sweep.dir=sweep"]
    assert run_unread(str(ROOT / "train.py"), *arguments) == 0
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [job["state"] for job in record["jobs"]] == ["done", "done"]
    assert not list((tmp_path / "sweep").rglob(".lock"))
    assert run_unread("-m", "bqnn.report", "sweep", "--out", "report") == 0
    assert (tmp_path / "report" / "index.html").exists()
