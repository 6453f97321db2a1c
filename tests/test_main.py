"""The program `bqnn`: its verbs, and messages with the command that was typed."""

import sys
from pathlib import Path

import pytest

from bqnn.__main__ import VERBS, main
from bqnn.jobs.typed import command_line, program


def test_help_lists_each_verb_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(VERBS)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bqnn 0.")


@pytest.mark.parametrize("verb", ["trian", "", "-m", "train.py", "\x1b[2J"])
def test_an_unknown_verb_is_one_line_that_names_the_verbs(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "method=bbb"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bqnn: ")
    assert line.endswith("choose one of train, quantize, evaluate, export, report")
    assert line.isprintable()


def test_a_verb_gets_its_arguments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bqnn", "train", "nope=1"])
    with pytest.raises(SystemExit, match="1"):
        main()
    message = "bqnn train: nope: there is no such key (bqnn train --cfg job shows all)\n"
    assert capsys.readouterr().err == message
    assert sys.argv == ["bqnn", "train", "nope=1"]
    assert not list(tmp_path.iterdir())


def test_the_report_is_a_verb(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no runs found"):
        main(["report", str(tmp_path)])


@pytest.mark.parametrize(
    ("started", "typed", "name"),
    [
        ("train.py", "python quantize.py", "quantize.py"),
        ("../bqnn/evaluate.py", "python ../bqnn/quantize.py", "quantize.py"),
        ("/lib/bqnn/__main__.py", "python -m bqnn quantize", "bqnn quantize"),
        ("/somewhere/bin/bqnn", "/somewhere/bin/bqnn quantize", "bqnn quantize"),
        ("/lib/ipykernel_launcher.py", "bqnn quantize", "bqnn quantize"),
        ("", "bqnn quantize", "bqnn quantize"),
    ],
)
def test_messages_name_the_command_in_the_form_that_was_typed(
    started: str, typed: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started, "checkpoint=a.ckpt"])
    assert command_line("quantize") == typed
    assert program("quantize") == name


def test_a_command_on_the_path_is_named_without_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bqnn"
    file.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(file), "train"])
    assert command_line("train") == "bqnn train"
