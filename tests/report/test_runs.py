"""Every folder with a run's files is a row or is listed with the reason why it is none."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bqnn.report.runs import STAGES, read_runs
from bqnn.report.settings import flatten, labels
from bqnn.results import STAGES as WRITTEN

WriteRun = Callable[..., Path]


def problems(folder: Path) -> dict[str, tuple[str, str]]:
    return {Path(p.run).name: (p.state, p.reason) for p in read_runs([folder]).problems}


def test_metrics_and_configuration_are_enough(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("a", {"test/nll": 0.5, "num_samples": 3, "time/epoch_seconds": 2}, state=None)
    runs = read_runs([tmp_path])
    (row,) = runs.runs.to_dict("records")
    assert (row["task"], row["verb"], row["mode"], row["method"]) == (
        "digits",
        "train",
        "float",
        "bbb",
    )
    assert (row["seed"], row["test/nll"], row["num_samples"]) == (0, 0.5, 3)
    (score,) = runs.scores.to_dict("records")
    assert (score["numeric"], score["metric"], score["value"]) == ("float", "test/nll", 0.5)


def test_scripts_stages_and_bits_are_told_apart(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("train", {"test/nll": 1.0})
    write_run("ptq", {"float/test/nll": 1.0, "int8/test/nll": 2.0}, bits=(3, 7))
    write_run("qat", {"int8/test/nll": 3.0}, bits=(3, 7), mode="qat")
    write_run("evaluate", {"int8/ood/uniform/ape": 4.0}, bits=(3, 7), mode="qat", numeric="int8")
    scores = read_runs([tmp_path]).scores
    found = scores[["verb", "mode", "numeric", "metric", "value"]].itertuples(index=False)
    assert sorted(map(tuple, found)) == [
        ("evaluate", "qat", "int8", "ood/uniform/ape", 4.0),
        ("quantize", "ptq", "float", "test/nll", 1.0),
        ("quantize", "ptq", "int8", "test/nll", 2.0),
        ("quantize", "qat", "int8", "test/nll", 3.0),
        ("train", "float", "float", "test/nll", 1.0),
    ]
    assert STAGES == WRITTEN


def test_what_is_no_finished_run_is_listed(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("fine", {"test/nll": 1.0})
    for state in ("FAILED", "INTERRUPTED", "RUNNING"):
        folder = write_run(state.lower(), {"test/nll": 9.0}, state=state, seed=5)
        status = {"state": state, "start": "yesterday", "error": f"why {state}"}
        (folder / "status.json").write_text(json.dumps(status))
    (write_run("empty", {}, seed=6) / "metrics.json").unlink()
    (write_run("unnamed", {}, seed=7) / "config.yaml").unlink()
    (write_run("cut", {}, seed=8) / "metrics.json").write_text('{"test/nll": 0.')
    write_run("nan", {"test/nll": float("nan")}, seed=11)
    (write_run("foreign", {}, seed=9) / "config.yaml").write_text("a: 1")
    (write_run("claimed", {}, seed=10) / "status.json").write_text("")
    refused = tmp_path / "runs" / "refused"  # a command line that never became a job
    refused.mkdir()
    (refused / "status.json").write_text('{"state": "FAILED", "error": "method=nonsense"}')

    runs = read_runs([tmp_path])
    assert list(runs.runs["test/nll"]) == [1.0]
    found = problems(tmp_path)
    assert found["failed"] == ("FAILED", "why FAILED")
    assert found["interrupted"] == ("INTERRUPTED", "why INTERRUPTED")
    assert found["running"] == ("RUNNING", "running since yesterday, or killed without notice")
    assert found["empty"] == ("MISSING", "there is no metrics.json")
    assert found["unnamed"] == ("MISSING", "there is no config.yaml")
    assert found["refused"] == ("FAILED", "method=nonsense")
    assert [found[name][0] for name in ("cut", "foreign", "claimed", "nan")] == ["BROKEN"] * 4
    assert found["nan"][1].endswith("test/nll is nan, which is no finite number")
    assert len(found) == 10


def test_the_folder_of_a_pattern_is_no_run_of_its_own(write_run: WriteRun, tmp_path: Path) -> None:
    whole = write_run("whole", {})
    (whole / "metrics.json").unlink()
    write_run("whole/0_bbb_digits", {"test/nll": 1.0})
    write_run("whole/0_bbb_digits/wandb/run/files", {"test/nll": 7.0})
    runs = read_runs([tmp_path, whole])  # found twice, counted once
    assert (len(runs.runs), runs.problems) == (1, [])


def test_of_equal_runs_the_last_one_counts(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("b_old", {"test/nll": 1.0}, start="2026-01-01")
    write_run("a_new", {"test/nll": 2.0}, start="2026-01-02", data_dir="elsewhere")
    runs = read_runs([tmp_path])
    assert list(runs.runs["test/nll"]) == [2.0]
    assert problems(tmp_path)["b_old"][0] == "REPEATED"


def test_other_options_are_never_averaged(write_run: WriteRun, tmp_path: Path) -> None:
    for number, epochs in enumerate((3, 5)):
        for rate in (0.1, 0.2):
            trainer = {"max_epochs": epochs, "threads": number}
            write_run(f"{rate}_{epochs}", {"test/nll": 1.0}, lr=rate, trainer=trainer)
    runs = read_runs([tmp_path]).runs
    assert sorted(set(runs["method"])) == ["bbb optimizer.lr=0.1", "bbb optimizer.lr=0.2"]
    assert sorted(set(runs["setting"])) == ["trainer.max_epochs=3", "trainer.max_epochs=5"]


def test_a_quantized_run_remembers_how_long_its_network_was_trained(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for epochs in (1, 9):
        source = write_run(f"t{epochs}", {"test/nll": 1.0}, trainer={"max_epochs": epochs})
        checkpoint = str(source / "checkpoint.ckpt")
        write_run(f"q{epochs}", {"int8/test/nll": 1.0}, bits=(4, 7), checkpoint=checkpoint)
    runs = read_runs([tmp_path]).runs
    settings = set(runs.loc[runs["verb"] == "quantize", "setting"])
    assert settings == {"trained.trainer.max_epochs=1", "trained.trainer.max_epochs=9"}


def test_the_best_epoch_is_another_network_than_the_last(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for name in ("best", "checkpoint"):
        write_run(name, {"int8/test/nll": 1.0}, bits=(4, 7), checkpoint=f"a/{name}.ckpt")
    runs = read_runs([tmp_path]).runs
    assert sorted(runs["setting"]) == ["checkpoint=best.ckpt", "checkpoint=checkpoint.ckpt"]


def test_a_preset_is_said_in_one_word() -> None:
    default = flatten({"quant": {"name": "default", "granularity": "channel", "lr": 1}})
    paper = flatten({"quant": {"name": "paper", "granularity": "tensor", "lr": 2}})
    assert labels([default, paper]) == (["", ""], ["quant.name=default", "quant.name=paper"])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_runs([tmp_path / "nowhere"])
