"""Every folder with the files of a run is a row, or is listed with a reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bqnn.evaluation.tables import STAGES as WRITTEN
from bqnn.report.runs import STAGES, read_runs
from bqnn.report.settings import flatten, method_labels, setting_labels
from bqnn.report.summary import missing_cells

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


def test_unfinished_runs_are_listed(write_run: WriteRun, tmp_path: Path) -> None:
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
    exported = write_run("exported", {}, seed=12)  # a file of a run that is compared itself
    (exported / "metrics.json").rename(exported / "verification.json")
    refused = tmp_path / "runs" / "refused"  # a command line that never became a job
    refused.mkdir()
    (refused / "status.json").write_text('{"state": "FAILED", "error": "method=nonsense"}')

    runs = read_runs([tmp_path])
    assert list(runs.runs["test/nll"]) == [1.0]
    found = problems(tmp_path)
    assert found["failed"] == ("FAILED", "why FAILED")
    assert found["interrupted"] == ("INTERRUPTED", "why INTERRUPTED")
    assert found["running"] == ("RUNNING", "running since yesterday, or killed")
    assert found["empty"] == ("MISSING", "there is no metrics.json")
    assert found["unnamed"] == ("MISSING", "there is no config.yaml")
    assert "refused" not in found
    assert [found[name][0] for name in ("cut", "foreign", "claimed", "nan")] == ["BROKEN"] * 4
    assert found["nan"][1].endswith("test/nll is nan, which is not a finite number")
    assert len(found) == 9


def test_the_folder_of_a_pattern_is_not_a_run(write_run: WriteRun, tmp_path: Path) -> None:
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


def test_a_preset_is_labelled_by_its_name() -> None:
    default = flatten({"quant": {"name": "default", "granularity": "channel", "lr": 1}})
    paper = flatten({"quant": {"name": "paper", "granularity": "tensor", "lr": 2}})
    assert method_labels([default, paper]) == ["", ""]
    labels = setting_labels([default, paper], ["bbb", "bbb"], ["", ""])
    assert labels == ["quant.name=default", "quant.name=paper"]


def test_methods_are_compared_in_one_scheme_and_in_one_network_alone() -> None:
    fbgemm, x86 = ({"quant.engine": engine} for engine in ("fbgemm", "x86"))
    labels = setting_labels([fbgemm, x86, fbgemm], ["bbb", "bbb", "pointwise"], [""] * 3)
    assert labels == ["quant.engine=fbgemm", "quant.engine=x86", "quant.engine=fbgemm"]
    labels = setting_labels([fbgemm, x86], ["bbb", "pointwise"], ["", ""])
    assert labels == ["quant.engine=fbgemm", "quant.engine=x86"]


def test_options_chosen_for_each_method_are_left_out_of_labels() -> None:
    short, long = ({"trainer.max_epochs": number} for number in ("5", "40"))
    assert setting_labels([short, long], ["bbb", "pointwise"], ["", ""]) == ["", ""]
    labels = setting_labels([short, long, long], ["bbb", "bbb", "pointwise"], [""] * 3)
    assert labels == ["trainer.max_epochs=5", "", ""]


def test_an_option_that_some_networks_lack_still_tells_the_others_apart() -> None:
    lenet = {"net.name": "lenet"}
    narrow, wide = ({"net.name": "resnet", "net.width": width} for width in ("8", "16"))
    assert setting_labels([lenet, narrow, wide], ["bbb"] * 3, [""] * 3) == [
        "net.name=lenet",
        "net.name=resnet net.width=8",
        "net.name=resnet net.width=16",
    ]


def test_fine_tunings_of_one_network_are_repetitions(write_run: WriteRun, tmp_path: Path) -> None:
    def quantize(method: str, trained: int, tuned: int | None) -> Path:
        quant = {"name": "default", "mode": "qat", "weight_bits": 4, "activation_bits": 7}
        return write_run(
            f"{method}_{trained}_{tuned}", {"int8/test/nll": 1.0}, method=method, seed=trained,
            checkpoint=f"{method}/checkpoint.ckpt", quant={**quant, "fine_tuning": {"seed": tuned}},
        )  # fmt: skip

    for tuned in (0, 1, 2):  # as select=best has it: of each method another network
        quantize("bbb", 5, tuned)
        folder = quantize("pointwise", 7, tuned)
        quant = {"name": "checkpoint", "mode": "qat", "weight_bits": 4, "activation_bits": 7}
        write_run(
            f"evaluate_{tuned}", {"simulated/test/nll": 1.0}, method="pointwise", seed=7,
            checkpoint=f"{folder}/checkpoint.ckpt", quant=quant, numeric=None,
        )  # fmt: skip
    runs = read_runs([tmp_path])
    assert runs.problems == []
    assert set(runs.runs["setting"]) == {""}
    assert list(runs.runs["seed"]) == 3 * [0, 1, 2]
    assert missing_cells(runs.runs) == []

    quantize("bbb", 0, None)  # of two networks, settings of their own
    settings = read_runs([tmp_path]).runs.query("method == 'bbb'")["setting"]
    assert set(settings) == {"trained.seed=5", "trained.seed=own"}


def test_seeds_of_a_fine_tuning_are_none_of_a_calibration(
    write_run: WriteRun, tmp_path: Path
) -> None:
    quant = {"name": "default", "mode": "ptq", "weight_bits": 4, "activation_bits": 7}
    for tuned in (0, 1):
        config = {"quant": {**quant, "fine_tuning": {"seed": tuned}}}
        write_run(f"{tuned}", {"int8/test/nll": 1.0}, checkpoint="a/b.ckpt", **config)
    runs = read_runs([tmp_path])
    assert (len(runs.runs), len(runs.problems)) == (1, 1)


def test_a_source_is_found_from_where_the_job_was(write_run: WriteRun, tmp_path: Path) -> None:
    for epochs in (1, 9):
        write_run(f"t{epochs}", {"test/nll": 1.0}, trainer={"max_epochs": epochs})
        checkpoint = f"runs/t{epochs}/checkpoint.ckpt"
        write_run(f"q{epochs}", {"int8/test/nll": 1.0}, bits=(4, 7), checkpoint=checkpoint)
    settings = read_runs([tmp_path]).runs.query("verb == 'quantize'")["setting"]
    assert set(settings) == {"trained.trainer.max_epochs=1", "trained.trainer.max_epochs=9"}


def test_odd_files_cost_one_run(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("good", {"int8/test/nll": 1.0}, bits=(4, 7), checkpoint=f"{tmp_path}/runs/cut/a.ckpt")
    (write_run("cut", {"test/nll": 1.0}, seed=1) / "config.yaml").write_text("method: {")
    (write_run("size", {"test/nll": 1.0}, seed=2) / "size.json").write_text("")
    write_run("quant", {"test/nll": 1.0}, seed=3, quant=None)
    runs = read_runs([tmp_path])
    assert [Path(run).name for run in runs.runs["run"]] == ["good"]
    assert {Path(problem.run).name for problem in runs.problems} == {"cut", "size", "quant"}
    assert {problem.state for problem in runs.problems} == {"BROKEN"}


def test_a_method_has_one_name_in_all_scripts(write_run: WriteRun, tmp_path: Path) -> None:
    for rate in (0.1, 0.2):
        write_run(f"t{rate}", {"test/nll": 1.0}, lr=rate)
    write_run("q", {"int8/test/nll": 1.0}, lr=0.2, bits=(4, 7))
    runs = read_runs([tmp_path]).runs
    assert set(runs.loc[runs["verb"] == "quantize", "method"]) == {"bbb optimizer.lr=0.2"}


def test_means_from_a_checkpoint_are_another_way_to_train(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for seed in (0, 1):
        for init_from in (None, f"pointwise_{seed}/checkpoint.ckpt"):
            folder = write_run(f"{seed}_{init_from is None}", {"test/nll": 1.0}, seed=seed)
            config = yaml.safe_load((folder / "config.yaml").read_text())
            config["method"]["init_from"] = init_from
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
    methods = read_runs([tmp_path]).runs["method"]
    assert sorted(methods) == 2 * ["bbb init_from=None"] + 2 * ["bbb init_from=checkpoint"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_runs([tmp_path / "nowhere"])
