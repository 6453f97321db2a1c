"""evaluate.py on trained and on quantized networks."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import bqnn
from bqnn.data import DigitsData

ScriptHere = Callable[..., tuple[int, str]]
QUICK = ["logger=none", "plots=false", "suite=test"]


def read(folder: Path, name: str = "metrics.json") -> dict:
    return json.loads((folder / name).read_text())


def test_rows_stop_early(trained: Path, script_here: ScriptHere, tmp_path: Path) -> None:
    checkpoint = f"checkpoint={trained}/mcdropout_0/checkpoint.ckpt"
    early = ["max_samples=20", "tolerance=0.05", "hydra.run.dir=run"]
    code, errors = script_here("evaluate", checkpoint, *QUICK, *early)
    assert code == 0, errors
    metrics, run = read(tmp_path / "run"), tmp_path / "run"
    assert metrics["num_samples"] == 20
    with np.load(run / "uncertainty.npz") as arrays, np.load(run / "predictions.npz") as rows:
        counts = arrays["test/num_samples"]
        assert set(counts.tolist()) <= {2, 4, 8, 16, 20}
        assert metrics["test/num_samples"] == pytest.approx(counts.mean())
        assert 2 < counts.mean() < 20
        assert np.array_equal(rows["num_samples"], counts)
        made = np.isfinite(rows["samples"]).all(-1).sum(0)
        assert np.array_equal(made, counts)


@pytest.mark.parametrize("numeric", ["float", "simulated"])
def test_a_single_pass(
    numeric: str, trained: Path, quantized: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    folder = trained / "bbb_0" if numeric == "float" else quantized
    arguments = [f"checkpoint={folder}/checkpoint.ckpt", *QUICK, "predictive=moments"]
    code, errors = script_here("evaluate", *arguments, "hydra.run.dir=run")
    assert code == 0, errors
    metrics, prefix = read(tmp_path / "run"), "" if numeric == "float" else "simulated/"
    assert metrics["num_samples"] == 100
    assert 0.01 < metrics[f"{prefix}moments/factor"] < 100
    draws = ["num_samples=100", "hydra.run.dir=draws"]
    assert script_here("evaluate", arguments[0], *QUICK, *draws)[0] == 0
    expected = read(tmp_path / "draws")
    key = f"{prefix}test/nll"
    assert metrics[key] == pytest.approx(expected[key], rel=0.1)
    key = f"{prefix}test/mi"
    assert metrics[key] == pytest.approx(expected[key], rel=0.5)


@pytest.mark.parametrize("method", ["pointwise", "bbb", "mcdropout", "sghmc"])
def test_a_path_is_all_it_takes_and_the_test_set_scores_as_in_training(
    method: str, trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    run = trained / f"{method}_0"
    arguments = [f"checkpoint={run}/checkpoint.ckpt", "logger=none", "plots=false"]
    code, errors = script_here("evaluate", *arguments, "hydra.run.dir=run")
    assert code == 0, errors
    metrics, before = read(tmp_path / "run"), read(run)
    assert all(math.isfinite(value) for value in metrics.values())
    for key, value in before.items():
        if key.startswith(("test/", "val/")):
            assert metrics[key] == pytest.approx(value, abs=1e-6), key  # Lightning logs float32
    sets = {name.rpartition("/")[0] for name in metrics} - {""}
    levels = [1, 2, 3, 4, 5, "mean"]
    kinds = ("rotation", "shift", "brightness", "noise", "blur")
    shifted = {f"shift/{kind}_{level}" for kind in kinds for level in levels}
    assert sets == {"train", "val", "test", "ood/uniform", "ood/inverted", *shifted}
    assert metrics["shift/rotation_5/error"] > metrics["test/error"]
    assert read(tmp_path / "run", "status.json")["state"] == "DONE"
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["method"]["name"], config["task"]["name"]) == (method, "digits")
    assert config["quant"] == {"name": "none"}


def test_everything_at_once_with_another_number_of_draws(
    trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [f"checkpoint={trained}/mcdropout_0/checkpoint.ckpt", "num_samples=7"]
    arguments += ["convergence=true", "suite=ood", "suite.distortions=[noise]", "logger=csv"]
    code, errors = script_here("evaluate", *arguments, "hydra.run.dir=run")
    assert code == 0, errors
    run = tmp_path / "run"
    metrics = read(run)
    assert metrics["num_samples"] == 7
    with (run / "convergence.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["num_samples"]) for row in rows] == list(range(1, 8))
    for name in ("error", "nll", "ape", "mi", "ece"):
        assert float(rows[-1][name]) == pytest.approx(metrics[f"test/{name}"], abs=1e-9)
    assert float(rows[0]["mi"]) == 0
    assert np.load(run / "predictions.npz")["samples"].shape == (7, 364, 10)
    assert np.load(run / "uncertainty.npz")["ood/uniform/entropy"].shape == (364,)
    with (run / "shift_noise.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    figures = {"reliability", "confidence", "shift", "risk_coverage", "ood", "convergence"}
    assert {path.stem for path in run.glob("*.png")} == figures
    assert "ood/uniform/auroc_entropy" in (run / "csv" / "metrics.csv").read_text()


def test_a_regression_meets_inputs_out_of_its_range(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = ["task=synthetic", "task.function=linear", "method=mcdropout", "logger=none"]
    arguments += ["trainer.max_epochs=60", "plots=false", "hydra.run.dir=float"]
    assert script_here("train", *arguments)[0] == 0
    arguments = ["checkpoint=float/checkpoint.ckpt", "convergence=true", "logger=none"]
    code, errors = script_here("evaluate", *arguments, "hydra.run.dir=run")
    assert code == 0, errors
    metrics = read(tmp_path / "run")
    assert metrics["ood/out_of_range/epistemic_std"] > metrics["test/epistemic_std"]
    assert metrics["ood/out_of_range/auroc_epistemic_std"] > 0.6
    variance = metrics["test/aleatoric_std"] ** 2 + metrics["test/epistemic_std"] ** 2
    assert metrics["test/std"] ** 2 == pytest.approx(variance)
    assert {"fit.png", "ood.png", "convergence.png"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


@pytest.mark.parametrize("numeric", [None, "unquantized", "simulated", "int8"])
def test_a_quantized_network_is_evaluated_as_asked(
    numeric: str | None, quantized: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [f"checkpoint={quantized}/checkpoint.ckpt", *QUICK]
    arguments += [] if numeric is None else [f"numeric={numeric}"]
    code, errors = script_here("evaluate", *arguments, "hydra.run.dir=run")
    assert code == 0, errors
    metrics, before = read(tmp_path / "run"), read(quantized)
    prefix = f"{numeric or 'simulated'}/test/"
    found = {key: value for key, value in before.items() if key.startswith(prefix)}
    assert len(found) == 8
    for key, value in found.items():
        assert metrics[key] == pytest.approx(value, abs=1e-12), key
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["numeric"] == (numeric or "simulated")
    assert (config["quant"]["mode"], config["quant"]["weight_bits"]) == ("ptq", 4)


def test_a_pattern_is_expanded_and_counted(
    trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    pattern = f"checkpoint={trained}/pointwise_*/checkpoint.ckpt"
    code, errors = script_here("evaluate", pattern, *QUICK, "hydra.run.dir=run")
    assert code == 0, errors
    assert "2 checkpoints match" in errors
    parts = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert parts == ["0_pointwise_digits", "1_pointwise_digits"]
    for seed, part in enumerate(parts):
        folder = tmp_path / "run" / part
        before = read(trained / f"pointwise_{seed}")["test/nll"]
        assert read(folder)["test/nll"] == pytest.approx(before, abs=1e-6)


def test_numeric_leaves_float_networks_of_a_pattern_out(
    trained: Path, quantized: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    for name, source in (("float", trained / "bbb_0"), ("quantized", quantized)):
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / "checkpoint.ckpt").symlink_to(source / "checkpoint.ckpt")
    arguments = ["checkpoint=all/**/checkpoint.ckpt", "numeric=int8", *QUICK]
    code, errors = script_here("evaluate", *arguments, "hydra.run.dir=run")
    assert code == 0, errors
    assert "skipped 1 checkpoints" in errors
    assert "int8/test/nll" in read(tmp_path / "run" / "0_bbb_digits")


@pytest.mark.parametrize("numeric", [None, "simulated", "int8"])
def test_a_calibration_is_reported_beside_saved_and_applied(
    numeric: str | None, trained: Path, quantized: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    source = trained / "bbb_0" if numeric is None else quantized
    arguments = [f"checkpoint={source}", *QUICK, *([f"numeric={numeric}"] if numeric else [])]
    code, errors = script_here("evaluate", *arguments, "hydra.run.dir=raw")
    assert code == 0, errors
    arguments += ["calibrate=temperature", "save_calibrated=true"]
    code, errors = script_here("evaluate", *arguments, "hydra.run.dir=run")
    assert code == 0, errors
    run, prefix = tmp_path / "run", f"{numeric}/" if numeric else ""
    metrics, raw = read(run), read(tmp_path / "raw")
    assert {key: metrics[key] for key in raw} == raw
    record = read(run, "calibration.json")
    assert record["validation_nll_after"] < record["validation_nll_before"]
    assert metrics[f"{prefix}calibration/temperature"] == record["temperature"]
    for name in ("predictions.npz", "uncertainty.npz", "risk_coverage.csv"):
        assert (run / "calibrated" / name).exists()
    assert not any("coverage" in key for key in metrics)

    data = DigitsData()
    data.setup()
    answer = bqnn.load(run / "calibrated.ckpt", numeric).predict(data.test.inputs)
    nll = -answer.probabilities[torch.arange(364), data.test.targets].log().mean().item()
    assert nll == pytest.approx(metrics[f"{prefix}calibrated/test/nll"], abs=1e-9)
    assert nll != pytest.approx(raw[f"{prefix}test/nll"], abs=1e-4)

    arguments = [f"checkpoint={run}/calibrated.ckpt", *QUICK]
    arguments += [f"numeric={numeric}"] if numeric else []
    code, errors = script_here("evaluate", *arguments, "hydra.run.dir=again")
    assert code == 0, errors
    calibrated = {
        key: metrics[key.replace("test/", "calibrated/test/")] for key in raw if "/" in key
    }
    assert {key: read(tmp_path / "again")[key] for key in calibrated} == calibrated


def test_a_calibration_of_float_outputs_is_not_that_of_quantized_ones(
    trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [f"checkpoint={trained}/pointwise_0", *QUICK, "calibrate=vector"]
    code, errors = script_here("evaluate", *arguments, "save_calibrated=true", "hydra.run.dir=run")
    assert code == 0, errors
    assert len(bqnn.load(tmp_path / "run" / "calibrated.ckpt").recipe["calibration"]["bias"]) == 10
    quick = ["quant.mode=ptq", "logger=none", "plots=false"]
    results = []
    for source in (f"{trained}/pointwise_0/checkpoint.ckpt", "run/calibrated.ckpt"):
        code, errors = script_here("quantize", f"checkpoint={source}", *quick, "hydra.run.dir=q")
        assert code == 0, errors
        results.append({k: v for k, v in read(tmp_path / "q").items() if "test/" in k})
        (tmp_path / "q").rename(tmp_path / f"q{len(results)}")
    assert "has a calibration (vector) of its float outputs, which is left out" in errors
    assert results[0] == results[1]
    assert "calibration" not in bqnn.load(tmp_path / "q2").recipe


def test_the_deviation_of_a_regression_is_calibrated(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = ["task=synthetic", "method=mcdropout", "logger=none", "trainer.max_epochs=5"]
    assert script_here("train", *arguments, "plots=false", "hydra.run.dir=float")[0] == 0
    arguments = ["checkpoint=float", "calibrate=temperature", "suite=test", "logger=none"]
    code, errors = script_here("evaluate", *arguments, "hydra.run.dir=run")
    assert code == 0, errors
    metrics = read(tmp_path / "run")
    factor = metrics["calibration/factor"]
    for name in ("std", "aleatoric_std", "epistemic_std"):
        expected = factor * metrics[f"test/{name}"]
        assert metrics[f"calibrated/test/{name}"] == pytest.approx(expected, rel=1e-4)
    assert metrics["calibrated/test/rmse"] == pytest.approx(metrics["test/rmse"], rel=1e-6)
    assert {path.name for path in (tmp_path / "run" / "calibrated").glob("*.png")} == {
        path.name for path in (tmp_path / "run").glob("*.png")
    }
    code, errors = script_here("evaluate", *arguments[:1], *QUICK, "calibrate=vector")
    assert code == 1
    assert "calibrate=vector: a regression has no classes to scale; choose temperature" in errors


@pytest.mark.parametrize("numeric", [None, "int8"])
def test_conformal_sets_cover_test_and_shifted_rows_as_reported(
    numeric: str | None, trained: Path, quantized: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    source = trained / "bbb_0" if numeric is None else quantized
    arguments = [f"checkpoint={source}", "conformal=0.1", "suite=default", "suite.splits=[test]"]
    arguments += ["suite.distortions=[noise]", "logger=none", "calibrate=temperature"]
    arguments += [f"numeric={numeric}"] if numeric else []
    code, errors = script_here("evaluate", *arguments, "hydra.run.dir=run")
    assert code == 0, errors
    run, prefix = tmp_path / "run", f"{numeric}/" if numeric else ""
    metrics = read(run)
    assert metrics[f"{prefix}conformal/level"] == 0.9
    for score in ("lac", "aps", "raps"):
        # Four deviations, of 143 validation rows and of 364 test rows.
        assert metrics[f"{prefix}test/coverage_{score}"] == pytest.approx(0.9, abs=0.12)
        assert 0 <= metrics[f"{prefix}test/worst_class_coverage_{score}"] <= 1
        assert 0 <= metrics[f"{prefix}ood/uniform/size_{score}"] <= 10
        assert f"{prefix}ood/inverted/coverage_{score}" not in metrics
        assert f"{prefix}calibrated/shift/noise_mean/coverage_{score}" in metrics
    with (run / "conformal.csv").open() as file:
        table = list(csv.DictReader(file))
    names = {row["set"] for row in table}
    assert names == {"test", *(f"shift/noise_{level}" for level in range(1, 6))}
    for name in names:
        rows = {row["class"]: row for row in table if (row["set"], row["score"]) == (name, "aps")}
        whole = rows.pop("all")
        assert float(whole["coverage"]) == metrics[f"{prefix}{name}/coverage_aps"]
        counts = {key: int(row["rows"]) for key, row in rows.items()}
        assert (len(counts), sum(counts.values())) == (10, 364)
        for number in ("coverage", "size"):
            mean = sum(counts[key] * float(row[number]) for key, row in rows.items()) / 364
            assert mean == pytest.approx(float(whole[number]))


def test_intervals_of_a_regression_cover_its_targets(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = ["task=synthetic", "method=bbb", "logger=none", "plots=false", "seed=1"]
    arguments += ["task.num_train=2000", "task.num_test=1000", "trainer.max_epochs=2"]
    assert script_here("train", *arguments, "hydra.run.dir=float")[0] == 0
    arguments = ["checkpoint=float", "conformal=0.2", "suite=ood", "logger=none", "plots=false"]
    code, errors = script_here("evaluate", *arguments, "hydra.run.dir=run")
    assert code == 0, errors
    metrics = read(tmp_path / "run")
    for score in ("normalized", "cqr"):
        deviation = math.sqrt(0.2 * 0.8 * (1 / 400 + 1 / 1000))
        assert metrics[f"test/coverage_{score}"] == pytest.approx(0.8, abs=4 * deviation)
        assert metrics[f"test/width_{score}"] > 0
        assert metrics[f"ood/out_of_range/width_{score}"] > 0


def test_too_few_validation_rows_are_refused_before_any_prediction(
    trained: Path, script_here: ScriptHere
) -> None:
    code, errors = script_here("evaluate", f"checkpoint={trained}/bbb_0", *QUICK, "conformal=1e-3")
    assert code == 1
    assert "conformal=0.001: 143 validation rows are too few for a coverage of 0.999;" in errors
    code, errors = script_here("evaluate", f"checkpoint={trained}/bbb_0", *QUICK, "conformal=1")
    assert code == 1
    assert "conformal=1: choose null, or a finite number above 0, below 1" in errors


def test_a_training_without_validation_rows_cannot_be_calibrated(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = ["method=pointwise", "task.validation_share=0", "logger=none", "plots=false"]
    code, _ = script_here("train", *arguments, "trainer.max_epochs=1", "hydra.run.dir=float")
    assert code == 0
    code, errors = script_here("evaluate", "checkpoint=float", *QUICK, "calibrate=temperature")
    assert code == 1
    assert "calibrate=temperature: it is fitted on validation rows, and the training kept" in errors
    code, errors = script_here("evaluate", "checkpoint=float", *QUICK, "conformal=0.1")
    assert code == 1
    assert "conformal=0.1: it is fitted on validation rows, and the training kept none" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bbb_0", "save_calibrated=true"], "there is no calibration to save; add calibrate="),
        (["bbb_0", "calibrate=isotonic"], "calibrate=isotonic: choose null, or temperature or"),
        (["sghmc_0", "num_samples=5"], "num_samples=5: this ensemble has 2 members"),
        (["bbb_0", "numeric=int8"], "not quantized, so float is its only numeric"),
        (["bbb_0", "num_samples=0"], "num_samples=0"),
        (["bbb_0", "suite=nothing"], "Could not find 'suite/nothing'"),
        (["bbb_0", "suite.ood=[svhn]"], "no set 'svhn'"),
        (["nowhere"], "no such file; train one"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    arguments: list[str], message: str, trained: Path, script_here: ScriptHere
) -> None:
    run, *rest = arguments
    checkpoint = f"checkpoint={trained}/{run}/checkpoint.ckpt"
    code, errors = script_here("evaluate", checkpoint, "logger=none", *rest, "hydra.run.dir=run")
    assert code == 1
    assert any(message in line for line in errors.splitlines()), errors


def test_a_quantized_network_knows_its_numerics(quantized: Path, script_here: ScriptHere) -> None:
    checkpoint = f"checkpoint={quantized}/checkpoint.ckpt"
    code, errors = script_here("evaluate", checkpoint, "numeric=int4", *QUICK)
    assert code == 1
    assert "numeric=int4: choose null, or unquantized or simulated or int8" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["max_samples=5"], "max_samples=5 without tolerance"),
        (["num_samples=5", "tolerance=0.1"], "num_samples=5 with tolerance"),
        (["tolerance=-1"], "tolerance=-1: choose"),
        (["tolerance=nan"], "tolerance=nan: choose"),
        (["tolerance=0.1", "conformal=0.1"], "tolerance=0.1 with conformal: it needs all draws"),
        (["tolerance=0.1", "predictive=moments"], "with predictive=moments: one pass cannot"),
        (["convergence=true", "predictive=moments"], "convergence=true with predictive=moments"),
        (["predictive=moment"], "predictive=moment: choose draws or moments"),
        (["predictive=moments"], "predictive=moments: the network has no random weights"),
    ],
)
def test_ways_to_predict_that_contradict_each_other(
    arguments: list[str], message: str, trained: Path, script_here: ScriptHere
) -> None:
    checkpoint = f"checkpoint={trained}/pointwise_0/checkpoint.ckpt"
    code, errors = script_here("evaluate", checkpoint, *QUICK, *arguments)
    assert code != 0
    assert message in errors.splitlines()[-1]


def test_integers_have_no_moments(quantized: Path, script_here: ScriptHere) -> None:
    arguments = [f"checkpoint={quantized}/checkpoint.ckpt", "numeric=int8", "predictive=moments"]
    code, errors = script_here("evaluate", *arguments, *QUICK)
    assert code != 0
    assert "predictive=moments with numeric=int8: integers have no variances" in errors
