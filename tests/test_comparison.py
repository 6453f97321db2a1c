"""The scripts that compare methods, and write the tables of the documents."""

import argparse
import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


comparison, results = script("comparison"), script("results")


def plan(out: Path, forms: list[str], **options: list[str]) -> Any:
    given = {verb: options.get(verb, []) for verb in comparison.VERBS}
    parsed = [comparison.Form.parse(form) for form in forms]
    return comparison.Plan(out, parsed, 0.1, yaml.safe_load(comparison.SETTINGS.read_text()), given)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("text", ["qat", "qat:9,7", "dynamic:4,7", "qat:4", "ptq:a,b", ""])
def test_a_form_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"write it as qat:4,7 or ptq:2,7"):
        comparison.Form.parse(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--processes", "0"],
        ["--splits", "-1"],
        ["--alpha", "1"],
        ["--alpha", "nan"],
        ["--methods", "x"],
    ],
)
def test_mistakes_end_before_any_training(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["comparison.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        comparison.main()
    assert stop.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_cell_is_trained_quantized_evaluated_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["trainer.max_epochs=2", "trainer.limit_train_batches=2"]
    cpu = ["trainer.accelerator=cpu", "trainer.threads=1"]
    made = plan(
        tmp_path / "out",
        ["ptq:4,7"],
        train=[*small, *cpu],
        quantize=[*cpu, "num_samples=1"],
        evaluate=[*cpu, "num_samples=1"],
    )
    cell = comparison.Cell("pointwise", "digits", 1)
    assert made.run(cell) is None
    table = tmp_path / "images.csv"
    comparison.write_rows(table, made.rows(cell))
    float_row, int8_row = read(table)
    assert (float_row["form"], int8_row["form"], int8_row["weight_bits"]) == ("float", "ptq", "4")
    metrics = json.loads((made.out / str(cell) / "ptq_w4a7_evaluated/metrics.json").read_text())
    assert float(int8_row["nll"]) == pytest.approx(metrics["int8/test/nll"], rel=1e-5)
    assert float(int8_row["auroc"]) == pytest.approx(
        metrics["int8/ood/uniform/auroc_entropy"], rel=1e-5
    )
    assert 0 < float(int8_row["bytes"]) < float(float_row["bytes"]) / 6
    assert float(float_row["training_seconds"]) > 0

    def must_not_run(*_: object) -> None:
        raise AssertionError("it trains again")

    monkeypatch.setattr("bqnn.commands.train.run", must_not_run)
    assert made.run(cell) is None  # everything is done before


def test_a_failed_cell_is_named_and_has_no_rows(tmp_path: Path) -> None:
    made = plan(tmp_path / "out", ["qat:4,7"], train=["method.no_such_option=1"])
    cell = comparison.Cell("pointwise", "digits", 0)
    assert "train" in made.run(cell)
    assert not (made.out / str(cell) / "qat_w4a7").exists()
    assert list(made.rows(cell)) == []


def test_a_network_of_a_failed_training_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, cell = plan(tmp_path, ["qat:4,7"]), comparison.Cell("laplace", "mnist", 0)
    folder = tmp_path / str(cell) / "float"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "FAILED", "error": "out of memory"}')
    (folder / "metrics.json").write_text('{"test/error": 0.1, "num_samples": 1}')
    ran = []

    def fail(verb: str, _: object) -> None:
        ran.append(verb)
        raise SystemExit(1)

    monkeypatch.setattr(comparison, "_run", fail)
    assert made.run(cell).endswith("out of memory")
    assert ran == ["train"]
    assert list(made.rows(cell)) == []


def test_rows_with_an_equal_key_are_replaced_and_others_stay(tmp_path: Path) -> None:
    def row(task: str, seed: int, nll: float) -> dict[str, Any]:
        values = (task, None, "bbb", seed, "float", None, None)
        return {**dict(zip(comparison.KEY, values, strict=True)), "nll": nll}

    table = tmp_path / "images.csv"
    comparison.write_rows(table, [row("mnist", 10, 0.1), row("mnist", 9, 0.2)])
    comparison.write_rows(table, [row("digits", 0, 0.3), row("mnist", 10, 0.4)])
    found = [(each["task"], each["seed"], each["nll"]) for each in read(table)]
    assert found == [("digits", "0", "0.3"), ("mnist", "9", "0.2"), ("mnist", "10", "0.4")]


def test_settings_name_tasks_methods_and_verbs_that_exist() -> None:
    for task, of_task in yaml.safe_load(comparison.SETTINGS.read_text()).items():
        assert (ROOT / "conf" / "task" / f"{task}.yaml").exists()
        assert of_task.keys() <= {"all", *comparison.METHODS}
        assert {verb for each in of_task.values() for verb in each} <= {*comparison.VERBS}


def test_a_table_is_written_between_its_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "TABLES", {"sums": lambda a, b: f"| {int(a) + int(b)} |"})
    text = "before\n<!-- table: sums a=1 b=2 -->\nold\n<!-- end of table -->\nafter\n"
    new = results.rewritten(text)
    assert new == (
        "before\n<!-- table: sums a=1 b=2 -->\n\n| 3 |\n\n<!-- end of table -->\nafter\n"
    )
    assert results.rewritten(new) == new


def test_the_tables_of_the_documents_are_those_of_the_results() -> None:
    for path in (ROOT / "docs").glob("*.md"):
        assert results.rewritten(path.read_text()) == path.read_text(), f"{path}: run make results"
