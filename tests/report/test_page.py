"""The HTML page: self-contained, with sortable tables, embedded figures and a dark mode."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bqnn.report.__main__ import main
from bqnn.report.figures import bit_widths, method_colors, size_figure, sweeps
from bqnn.report.runs import read_runs

WriteRun = Callable[..., Path]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = '<script src="https://example.org/x.js">&"'


class Seen(HTMLParser):
    """Records tags, what they refer to, and the depth of nesting at the end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def report(sweep: Path, write_run: WriteRun, tmp_path: Path) -> Path:
    """Report on the sweep, a failed run with a malicious error, and an invalid method name."""
    folder = write_run("failed", {}, seed=9)
    (folder / "status.json").write_text(json.dumps({"state": "FAILED", "error": EVIL}))
    write_run("evil", {"test/nll": 10.0}, method=EVIL, task="other")
    assert main([str(sweep), "--out", str(tmp_path / "out")]) is None
    return tmp_path / "out"


def test_the_report_is_files_that_hold_every_run(report: Path) -> None:
    import pandas as pd

    results = pd.read_csv(report / "results.csv")
    assert len(results) == 2 * 2 * 4 + 1
    summary = pd.read_csv(report / "summary.csv")
    assert {"mean", "std", "standard_error", "n"} <= set(summary)
    assert "FAILED" in set(pd.read_csv(report / "problems.csv")["state"])
    assert len(pd.read_csv(report / "differences.csv")) > 0
    names = {path.name for path in (report / "plots").iterdir()}
    sweep = "digits_ptq_weight_bits_a7_test"
    assert {f"{sweep}.png", f"{sweep}_nll.png", f"{sweep}_error.png", "digits_size.png"} == names
    text = (report / "report.md").read_text()
    assert "<script" not in text
    assert "| test/nll | 2 | 7 | bbb | 2 | 0.45 | 0.95 | 0.95 | 1.45 |" in text


def test_the_page_asks_for_nothing_and_escapes_everything(report: Path) -> None:
    text = (report / "index.html").read_text()
    seen = Seen(text)
    assert seen.open == []
    assert len(seen.references) == seen.tags.count("img") == 3
    assert all(reference.startswith("data:image/png;base64,") for reference in seen.references)
    assert seen.tags.count("script") == 1
    assert "default-src 'none'" in text
    assert "&lt;script src=" in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def test_figures_show_the_means_the_spread_and_the_float_value(sweep: Path) -> None:
    runs = read_runs([sweep])
    colors = method_colors(runs.scores)
    (found,) = sweeps(runs.scores)
    (axes, *_) = bit_widths(found, ["test/nll"], colors).axes
    (bbb, bbb_float, pointwise, _) = axes.lines
    assert list(bbb.get_xdata()) == list(pointwise.get_xdata()) == [2, 4, 8]
    assert list(bbb.get_ydata()) == pytest.approx([0.95, 0.7, 0.575])
    assert list(bbb_float.get_ydata()) == pytest.approx([0.45, 0.45])
    band = axes.collections[0].get_paths()[0].get_extents()
    deviation = 0.1 / 2**0.5  # of two values 0.1 apart
    assert (band.y0, band.y1) == pytest.approx((0.575 - deviation, 0.95 + deviation))

    figure = size_figure(runs.runs, colors)
    assert figure is not None
    (line, before, *_) = figure.axes[0].lines
    assert list(line.get_xdata()) == [2, 4, 8]  # kB
    assert list(line.get_ydata()) == pytest.approx([0.955] * 3)
    assert list(before.get_xdata()) == pytest.approx([4 * 14 / 3])


def test_coverage_and_size_of_conformal_sets_are_drawn_against_bits(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for bits in (2, 4, 8):
        metrics = {"int8/test/coverage_lac": 0.8, "int8/test/worst_class_coverage_lac": 0.7}
        metrics |= {"int8/test/size_lac": 2 / bits, "int8/conformal/level": 0.8}
        metrics |= {"int8/shift/noise_mean/size_aps": 3.0}
        write_run(f"w{bits}", metrics, bits=(bits, 7), numeric="int8", conformal=0.2)
    scores = read_runs([tmp_path / "runs"]).scores
    (sweep,) = sweeps(scores)
    assert sweep.sets() == {}
    assert sweep.level == 0.8
    found = sweep.conformal()
    names = ["test/coverage_lac", "test/size_lac", "test/worst_class_coverage_lac"]
    assert found == {"test": names, "shift/noise_mean": ["shift/noise_mean/size_aps"]}
    figure = bit_widths(sweep, names, method_colors(scores))
    coverage, size, _ = figure.axes
    assert list(size.lines[0].get_ydata()) == [1, 0.5, 0.25]
    assert len(size.lines) == 1
    assert list(coverage.lines[1].get_ydata()) == [0.8, 0.8]  # the dotted line
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) is None
    text = (tmp_path / "out/report.md").read_text()
    assert "Conformal sets of test" in text
    (drawn,) = (tmp_path / "out" / "plots").glob("*_test_conformal.png")
    assert drawn.name in text


def test_a_report_without_runs_says_so(tmp_path: Path) -> None:
    said = main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert said is not None
    assert "no runs" in said
    assert main([str(tmp_path / "nowhere")]) == (
        f"{tmp_path / 'nowhere'}: no such folder; give folders with runs in them"
    )


def test_failed_runs_alone_are_a_report(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("failed", {}, state="FAILED")
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) is None
    assert "FAILED" in (tmp_path / "out" / "index.html").read_text()


def test_the_convergence_of_chains_has_a_table(write_run: WriteRun, tmp_path: Path) -> None:
    for seed, rhat in enumerate((1.5, 1.7)):
        metrics = {"test/nll": 0.1, "val/rhat": rhat, "val/ess": 8.0}
        write_run(f"chains_{seed}", metrics, method="sghmc", seed=seed)
    write_run("other", {"test/nll": 0.2, "val/nll": 0.3})
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) is None
    text = (tmp_path / "out" / "report.md").read_text()
    _, _, section = text.partition("Convergence of Markov chains")
    table = section.partition("\n#")[0]
    assert re.search(r"\| val/rhat \|.* 1\.6 \|", table)
    assert re.search(r"\| val/ess \|.* 8 \|", table)
    assert "val/nll" not in table


PROBE = """
<script>
  const table = [...document.querySelectorAll("table")].at(-1);
  const column = [...table.tHead.rows[0].cells].findIndex(c => c.textContent === "test/nll");
  const values = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
  const button = table.tHead.rows[0].cells[column].firstElementChild;
  button.click();
  const up = values();
  button.click();
  document.title = "PROBE" + JSON.stringify({
    up, down: values(), sort: button.parentElement.getAttribute("aria-sort"),
    fits: document.documentElement.scrollWidth <= innerWidth,
    loaded: [...document.images].every(image => image.naturalWidth > 0),
    paper: getComputedStyle(document.body).backgroundColor,
  });
</script>
</body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_a_browser_sorts_fits_and_darkens(report: Path, tmp_path: Path) -> None:
    page = tmp_path / "probe.html"
    page.write_text((report / "index.html").read_text().replace("</body>", PROBE))
    light = browse(page)
    numbers = [float(value) for value in light["up"] if value]
    assert numbers == sorted(numbers)
    assert 10.0 in numbers  # which would come first as text
    assert light["up"][len(numbers) :] == [""] * (len(light["up"]) - len(numbers))
    assert [float(value) for value in light["down"] if value] == numbers[::-1]
    assert light["down"][-1] == light["up"][-1]
    assert light["sort"] == "descending"
    assert light["fits"]
    assert light["loaded"]
    dark = browse(page, "--blink-settings=preferredColorScheme=0")
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(22, 24, 27)")


def browse(page: Path, *options: str) -> dict:
    """Return the measurements of the probe in headless Chromium, in its narrowest window."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,900"]
    command += [*options, f"--user-data-dir={page.parent}/profile", "--dump-dom", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>PROBE(.*?)</title>", result.stdout)
    assert found, result.stderr
    return json.loads(found[1])
