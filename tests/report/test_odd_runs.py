"""An invalid run is excluded alone from a report, and its content never becomes markup."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from bqnn.plots.style import legend_name, new_figure, save_small, style
from bqnn.report.__main__ import main
from bqnn.report.runs import read_runs
from bqnn.report.tables import csv as as_csv
from bqnn.report.tables import plain

WriteRun = Callable[..., Path]

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
ODD_FILES = {
    "metrics.json": [
        b"[]", b"{}x", b'{"test/nll": "1"}', b'{"test/nll": true}', b'{"test/nll": null}',
        b'{"test/nll": [1]}', b'{"test/nll": NaN}', b'{"test/nll": 1e999}', b'{"seed": 3}',
        b'{"run": 1, "test/nll": 1}', b'{"a\\u001bb": 1}', b'{"' + b"x" * 300 + b'": 1}',
        b'{"test/nll": ' + b"9" * 400 + b"}", b'{"test/nll": ' + b"9" * 9999 + b"}",
        b'{"a": ' * 100_000, b"[" * 100_000, b"\xff\xfe{}", b"",
    ],
    "status.json": [
        b"[]", b"5", b'{"state": 5}', b'{"state": null}', b'{"state": ["DONE"]}',
        b'{"state": "DONE\\u001b[2J"}', b"{" * 100_000, b"\xff", b"",
    ],
    "size.json": [
        b'{"packed_bytes": "many"}', b'{"packed_bytes": [1]}', b"[]", b"", b'{"x": 1e400}',
        b'{"packed_bytes": {"a": 1}}',
    ],
    "config.yaml": [
        b"", b"5", b"[1]", b"a: 1", b"a: &a\n  b: *a\n", BOMB.encode(), b"[" * 100_000,
        b"{a: " * 5_000, b"!!python/object/apply:os.system ['true']", b"\xff\xfe", b"5: 1",
        b"method: {", b"? [1, 2]\n: 3\n",
    ],
}  # fmt: skip
ODD_VALUES: dict[str, list[Any]] = {
    "seed": ["abc", None, -1, 2**70, 1.5, True, [0], {"a": 0}],
    "task": [None, [], "digits", {"name": None}, {"name": ["a"]}, {"name": ""}, {"name": 5},
             {"name": "a", "split": "x"}, {"name": "a", "split": -1}, {"name": "é" * 5000}],
    "method": [None, "bbb", {"name": None}, {"name": {"a": 1}}],
    "quant": [None, "none", [], {"name": None}, {"name": "default"},
              {"name": "default", "mode": 5, "weight_bits": 4, "activation_bits": 7},
              {"name": "default", "mode": "ptq", "weight_bits": 4.5, "activation_bits": 7},
              {"name": "default", "mode": "ptq", "weight_bits": "4", "activation_bits": 7},
              {"name": "default", "mode": "qat", "weight_bits": 4, "activation_bits": 7,
               "fine_tuning": {"seed": "x"}}],
    "checkpoint": [5, None, ["a"]],
}  # fmt: skip
KINDS = [(name, content) for name, contents in ODD_FILES.items() for content in contents]


def only_the_good_one(tmp_path: Path, write_run: WriteRun) -> str:
    """Report on an invalid and a good run; return why the invalid one is excluded."""
    write_run("good", {"test/nll": 1.0}, method="sghmc")
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) is None
    runs = read_runs([tmp_path / "runs"])
    assert [Path(run).name for run in runs.runs["run"]] == ["good"]
    (problem,) = runs.problems
    assert (Path(problem.run).name, problem.state) == ("odd", "BROKEN")
    assert problem.reason.isprintable()
    assert len(problem.reason) < 500
    return problem.reason


@pytest.mark.parametrize(
    ("name", "content"), KINDS, ids=[f"{n}{i}" for i, (n, _) in enumerate(KINDS)]
)
def test_an_odd_file_costs_its_run_alone(
    tmp_path: Path, write_run: WriteRun, name: str, content: bytes
) -> None:
    (write_run("odd", {"test/nll": 2.0}, size=10) / name).write_bytes(content)
    only_the_good_one(tmp_path, write_run)


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in ODD_VALUES.items() for value in values],
    ids=lambda each: str(each)[:40],
)
def test_an_odd_value_costs_its_run_alone(
    tmp_path: Path, write_run: WriteRun, key: str, value: object
) -> None:
    folder = write_run("odd", {"test/nll": 2.0})
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {key: value}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    only_the_good_one(tmp_path, write_run)


@pytest.mark.parametrize("name", ["metrics.json", "status.json", "config.yaml", "size.json"])
def test_a_fifo_and_a_folder_in_place_of_a_file_are_not_a_run(
    tmp_path: Path, write_run: WriteRun, name: str
) -> None:
    path = write_run("odd", {"test/nll": 2.0}, size=10) / name
    path.unlink()
    os.mkfifo(path)
    assert "regular file" in only_the_good_one(tmp_path, write_run)
    path.unlink()
    path.mkdir()
    reasons = [problem.reason for problem in read_runs([tmp_path / "runs"]).problems]
    assert len(reasons) == 1


def test_a_deep_group_or_a_long_value_does_not_stop_the_report(
    tmp_path: Path, write_run: WriteRun
) -> None:
    deep: object = 1
    for _ in range(100):
        deep = {"a": deep}
    write_run("odd", {"test/nll": 2.0}, net=deep)
    assert "16 deep" in only_the_good_one(tmp_path, write_run)


def test_long_values_still_tell_runs_apart(tmp_path: Path, write_run: WriteRun) -> None:
    for number in range(2):
        write_run(f"{number}", {"test/nll": 1.0}, net={"name": "x" * 500 + str(number)})
    settings = set(read_runs([tmp_path]).runs["setting"])
    assert len(settings) == 2
    assert max(map(len, settings)) < 120


NAMES = ["$\\frac{$", "$x$", "é" * 100, "a/b", "../../up", "=1+1", "名前", "%s{}", "\x1b[2J"]


@pytest.mark.parametrize("name", NAMES)
def test_odd_names_are_drawn_and_written(tmp_path: Path, write_run: WriteRun, name: str) -> None:
    for bits in (2, 4):
        metrics = {
            "float/test/nll": 1.0,
            "int8/test/nll": 1 + 1 / bits,
            f"int8/test/{bits}$x_{{": 1,
        }
        write_run(f"{bits}", metrics, task=name, method=name, bits=(bits, 7), size=bits)
    out = tmp_path / "out"
    assert main([str(tmp_path / "runs"), "--out", str(out)]) is None
    assert len(read_runs([tmp_path / "runs"]).runs) == 2
    figures = list((out / "plots").iterdir())
    assert any("weight_bits" in figure.name for figure in figures)
    assert "\x1b" not in (out / "report.md").read_text() + (out / "index.html").read_text()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["名前", "\U0001fae0", "x" * 190, "W m " * 50], ids=ascii)
def test_names_that_a_font_lacks_or_that_are_long_are_drawn_without_a_warning(
    tmp_path: Path, name: str
) -> None:
    with style():
        figure = new_figure(3.4, 2.6)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], label=name)
        axes.set_title(name)
        axes.set_xticks([0, 1], [name, "b"], rotation=30)
        figure.legend()
    save_small(figure, tmp_path / "a.png")
    shown = [axes.get_title(), axes.get_xticklabels()[0].get_text()]
    assert all(text.isascii() and len(text) <= 60 for text in shown)


def test_a_name_that_begins_with_an_underscore_is_in_the_legend() -> None:
    assert (legend_name("_a"), legend_name("a")) == (" _a", "a")


def test_a_folder_whose_name_is_not_utf_8_is_reported(tmp_path: Path, write_run: WriteRun) -> None:
    good = write_run("good", {"test/nll": 1.0})
    odd = os.fsencode(tmp_path / "runs") + b"/\xff\xfe"
    os.rename(good, odd)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) is None
    assert "\\udcff\\udcfe" in (tmp_path / "out" / "results.csv").read_text()


def test_values_whose_squares_leave_float64_cost_their_runs_alone(
    tmp_path: Path, write_run: WriteRun
) -> None:
    for seed in (0, 1):
        write_run(f"odd{seed}", {"test/nll": 1.7e308}, seed=seed)
    write_run("good", {"test/nll": 1.0}, method="sghmc")
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) is None
    runs = read_runs([tmp_path / "runs"])
    assert len(runs.runs) == 1
    assert all("too large for statistics" in problem.reason for problem in runs.problems)


def test_values_far_apart_do_not_stop_the_report(tmp_path: Path, write_run: WriteRun) -> None:
    for number, value in enumerate((1e150, -1e150, 5e-324, 0.0)):
        for bits in (2, 4):
            metrics = {"float/test/nll": value, "int8/test/nll": value, "int8/test/error": 0.1}
            write_run(f"{number}_{bits}", metrics, seed=number, bits=(bits, 7), size=bits)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) is None
    assert len(read_runs([tmp_path / "runs"]).runs) == 8


@pytest.mark.parametrize("other", ["float/test/nll", "float//test/nll", "float/"])
def test_a_number_that_is_there_under_two_names_costs_its_run_alone(
    tmp_path: Path, write_run: WriteRun, other: str
) -> None:
    write_run("odd", {"test/nll": 1.0, other: 2.0})
    if other == "float/test/nll":
        assert "float/test/nll" in only_the_good_one(tmp_path, write_run)
    else:
        assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) is None


def test_a_level_of_many_digits_does_not_stop_the_report(
    tmp_path: Path, write_run: WriteRun
) -> None:
    for level in ("9" * 30, "1", "\u0663"):
        metrics = {"test/nll": 1.0, f"shift/blur_{level}/nll": 2.0}
        write_run(f"of {level}", metrics, checkpoint="a/checkpoint.ckpt", numeric=None)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) is None


@pytest.mark.parametrize(
    "sizes",
    [{"packed_bytes": 0, "float_bytes": 0}, {"packed_bytes": -5, "float_bytes": 1},
     {"packed_bytes": 3}, {"float_bytes": 3}],
)  # fmt: skip
def test_sizes_that_a_logarithm_does_not_take_are_not_drawn(
    tmp_path: Path, write_run: WriteRun, sizes: dict[str, int]
) -> None:
    for bits in (2, 4):
        folder = write_run(f"{bits}", {"int8/test/error": 0.1}, bits=(bits, 7))
        (folder / "size.json").write_text(json.dumps(sizes))
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) is None
    assert not (tmp_path / "out/plots/digits_size.png").exists()


def test_only_quantized_runs_are_drawn_against_size(tmp_path: Path, write_run: WriteRun) -> None:
    # With a checkpoint it counts as one of quantize.py, and yet it has no bits.
    write_run("odd", {"int8/test/error": 0.1}, size=10, checkpoint="a/checkpoint.ckpt")
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) is None


def test_an_unwritable_folder_is_an_error_of_one_line(tmp_path: Path, write_run: WriteRun) -> None:
    write_run("a", {"test/nll": 1.0})
    (tmp_path / "file").touch()
    (tmp_path / "out" / "results.csv").mkdir(parents=True)
    for name in ("file", "file/out", "out"):
        told = main([str(tmp_path / "runs"), "--out", str(tmp_path / name)])
        assert told is not None
        assert str(tmp_path / name) in told
        assert told.isprintable()


def test_what_started_last_counts_across_a_change_of_utc_offset(
    tmp_path: Path, write_run: WriteRun
) -> None:
    write_run("earlier", {"test/nll": 1.0}, start="2026-10-25T02:30:00+02:00")
    write_run("later", {"test/nll": 2.0}, start="2026-10-25T02:15:00+01:00", data_dir="x")
    assert list(read_runs([tmp_path]).runs["test/nll"]) == [2.0]


FORMULA = '=HYPERLINK("https://example.org","a")'


def test_no_cell_of_a_csv_is_a_formula(tmp_path: Path, write_run: WriteRun) -> None:
    write_run("a", {"test/nll": -1.0, "=1+1": 2.0}, task=FORMULA, method="@SUM(1)")
    failed = write_run("b", {}, state="FAILED", seed=4)
    (failed / "status.json").write_text(
        json.dumps({"state": "FAILED", "error": "\t-1+cmd|' /C'!A"})
    )
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) is None
    for path in (tmp_path / "out").glob("*.csv"):
        for row in csv.reader(path.read_text().splitlines()):
            for cell in row:
                is_number = cell.lstrip("-").replace(".", "").isdigit()
                assert is_number or not cell.startswith(("=", "+", "-", "@", "\t")), path.name
    _, first = (tmp_path / "out/results.csv").read_text().splitlines()
    assert f"'{FORMULA}" in next(csv.reader([first]))


def test_numbers_of_a_csv_stay_numbers() -> None:
    import pandas as pd

    assert as_csv(pd.DataFrame({"-a": [-1.5, 2.0], "b": ["x", "-y"]})) == "'-a,b\n-1.5,x\n2.0,'-y\n"


@pytest.mark.parametrize(
    "text",
    ["a_https://example.org", "1https://example.org", "a_www.example.org", "a.@example.org",
     "![x](https://example.org/a.png)", "<img src=x>", "[a](javascript:b)", "`a`", "**a**", "_a_",
     "https://example.org", "www.example.org", "me@example.org", "a\n# b", "~~a~~", "| a |", "\\*",
     "<https://example.org>", "&lt;script>", "# a", "- a", "+ a", "1. a", "2) a", "---", "a\n==="],
)  # fmt: skip
def test_a_text_in_markdown_is_shown_as_it_is(text: str) -> None:
    html = MarkdownIt("gfm-like").render(plain(text))
    for markup in ("<img", "<a ", "<code", "<em", "<strong", "<h1", "<s>", "<script", "<table"):
        assert markup not in html
    assert not re.search("<(li|ol|ul|h2|hr)", html)


def test_dollars_in_markdown_are_not_mathematics() -> None:
    assert plain("$x$") == "<span>$</span>x<span>$</span>"  # what GitHub's documentation says
    assert plain("-0.5") == "-0.5"
    assert plain("1.5") == "1.5"


def test_the_report_is_the_same_in_any_locale(tmp_path: Path, write_run: WriteRun) -> None:
    write_run("a", {"test/nll": 1.0}, task="größe")
    command = [sys.executable, "-m", "bqnn.report", str(tmp_path / "runs"), "--out"]
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for name, locale in (("plain", plain), ("utf8", {"PYTHONUTF8": "1"})):
        out = str(tmp_path / name)
        subprocess.run([*command, out], env={**os.environ, **locale}, check=True, timeout=120)
    pages = [(tmp_path / name / "index.html").read_bytes() for name in ("plain", "utf8")]
    assert pages[0] == pages[1]
