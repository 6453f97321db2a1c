"""quantize.py, and train.py with quantization from the start."""

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from bqnn.checkpoints.recipe import NUMERICS, load
from bqnn.data.task import make_data
from bqnn.inference.predictions import Prediction, score
from bqnn.methods import METHODS

ScriptHere = Callable[..., tuple[int, str]]
QUICK = ["logger=none", "quant.fine_tuning.max_epochs=2"]


AFTER_TRAINING = ("swag", "laplace")  # methods that set their posterior after the last epoch


@pytest.mark.parametrize("mode", ["qat", "ptq"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_quantized_and_described(
    method: str, mode: str, trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    checkpoint = trained / f"{method}_0" / "checkpoint.ckpt"
    arguments = [f"checkpoint={checkpoint}", f"quant.mode={mode}", "quant.weight_bits=4"]
    code, errors = script_here("quantize", *arguments, *QUICK, "hydra.run.dir=run")
    assert code == 0, errors
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert all(math.isfinite(value) for value in metrics.values())
    names = {
        stage: {name.split("/")[2] for name in metrics if name.startswith(f"{stage}/test/")}
        for stage in ("float", *NUMERICS)
    }
    assert all(found == names["float"] and "nll" in found for found in names.values())
    before = json.loads((checkpoint.parent / "metrics.json").read_text())
    assert metrics["float/test/nll"] == pytest.approx(before["test/nll"], abs=1e-6)
    for name in ("error", "nll", "ape"):
        simulated, executed = metrics[f"simulated/test/{name}"], metrics[f"int8/test/{name}"]
        assert executed == pytest.approx(simulated, abs=0.004)
    if mode == "ptq":
        assert metrics["unquantized/test/nll"] == pytest.approx(before["test/nll"], abs=1e-4)

    with (run / "quantization.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["weight_bits"] for row in rows} == {"4"}
    assert all(int(row["largest_disagreement_steps"]) <= 1 for row in rows)
    assert all(float(row["differing_share"]) <= 1e-3 for row in rows)
    moved = max(float(row["moved_share"]) for row in rows)
    assert (moved > 0) == (mode == "qat")
    size = json.loads((run / "size.json").read_text())
    assert size["packed_bytes"] < 0.6 * size["int8_bytes"] < 0.3 * size["float_bytes"]
    assert {"weights.png", "reliability.png"} <= {path.name for path in run.glob("*.png")}
    assert (run / "metrics.csv").exists() == (mode == "qat")

    data = make_data(yaml.safe_load((run / "config.yaml").read_text()))
    model = load(run / "checkpoint.ckpt", "int8")
    samples = model.predictive(data.normalize(data.test.inputs))
    assert np.array_equal(samples.numpy(), np.load(run / "predictions.npz")["samples"])


def test_members_of_an_ensemble_stay_different(
    trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [f"checkpoint={trained}/sghmc_0/checkpoint.ckpt", "logger=none", "plots=false"]
    arguments += ["quant.fine_tuning.max_epochs=1", "hydra.run.dir=run"]
    assert script_here("quantize", *arguments)[0] == 0
    assert "stays empty" not in (tmp_path / "run" / "quantize.log").read_text()
    net: Any = load(tmp_path / "run" / "checkpoint.ckpt").net
    first, second = net.members
    a, b = first.features[1], second.features[1]
    assert not torch.equal(a.weight, b.weight)
    assert not torch.equal(a.output_quant.scale, b.output_quant.scale)


def test_an_ensemble_without_members_is_calibrated_and_drawn(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = ["method=sghmc", "task=digits", "trainer=smoke", "logger=none", "plots=false"]
    assert script_here("train", *arguments, "hydra.run.dir=f")[0] == 0
    arguments = ["checkpoint=f/checkpoint.ckpt", "quant.mode=ptq", "logger=none"]
    code, errors = script_here("quantize", *arguments, "hydra.run.dir=q")
    assert code == 0, errors
    assert (tmp_path / "q" / "weights.png").exists()


def test_patterns_select_and_never_quantize_twice(
    trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    quick = ["quant.mode=ptq", "logger=none", "plots=false"]
    pattern = f"checkpoint={trained}/pointwise_*/checkpoint.ckpt"
    code, errors = script_here("quantize", pattern, *quick, "hydra.run.dir=all")
    assert code == 0, errors
    parts = sorted(path.name for path in (tmp_path / "all").iterdir() if path.is_dir())
    assert parts == ["0_pointwise_digits", "1_pointwise_digits"]
    states = [json.loads(p.read_text())["state"] for p in (tmp_path / "all").rglob("status.json")]
    assert states == ["DONE"] * 3

    code, errors = script_here("quantize", pattern, "select=best", *quick, "hydra.run.dir=best")
    assert code == 0, errors
    (part,) = (path for path in (tmp_path / "best").iterdir() if path.is_dir())
    chosen = yaml.safe_load((part / "config.yaml").read_text())["checkpoint"]
    nll = {
        seed: json.loads((trained / f"pointwise_{seed}" / "metrics.json").read_text())["val/nll"]
        for seed in (0, 1)
    }
    assert Path(chosen).parent.name == f"pointwise_{min(nll, key=nll.__getitem__)}"

    again = f"checkpoint={part}/checkpoint.ckpt"
    code, errors = script_here("quantize", again, *quick, "hydra.run.dir=again")
    assert code == 1
    assert "already quantized" in errors


@pytest.mark.parametrize("verb", ["quantize", "evaluate"])
def test_a_broken_match_of_a_pattern_fails_alone(
    verb: str, trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    whole = (trained / "pointwise_0" / "checkpoint.ckpt").read_bytes()
    for name, content in (("a", whole[:999]), ("b", whole)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.ckpt").write_bytes(content)
    quick = ["logger=none", "plots=false", "num_samples=1", "hydra.run.dir=run"]
    quick += ["quant.mode=ptq", "select=best"] if verb == "quantize" else ["suite=test"]
    code, errors = script_here(verb, "checkpoint=?/checkpoint.ckpt", *quick)
    assert code == 1
    assert "a/checkpoint.ckpt cannot be read as a checkpoint" in errors
    assert "1 of 2 failed: 0_unreadable" in errors
    assert (tmp_path / "run" / "1_pointwise_digits" / "metrics.json").exists()
    states = {
        part: json.loads((tmp_path / "run" / part / "status.json").read_text())["state"]
        for part in ("0_unreadable", "1_pointwise_digits")
    }
    assert states == {"0_unreadable": "FAILED", "1_pointwise_digits": "DONE"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quant.weight_bits=9"], "quant.weight_bits=9"),
        (["quant.engine=qnnpack"], "quant.engine=qnnpack"),
        (["quant.mode=dynamic"], "quant.mode=dynamic"),
        (["quant.overrides=[{layer: conv1, weight_bits: 8}]"], "matches no layer; choose from"),
        (["quant.weight_rounding=adaptive"], "only calibration"),
        (["quant.bias_correction=true"], "only calibration"),
        (["select=worst"], "select=worst: choose all or best"),
        (["quant.rounding=stochastic"], "quant.rounding=stochastic: it rounds"),
        (["quant.mode=ptq", "quant.rounding=stochastic"], "quant.rounding=stochastic: it rounds"),
        (["trainer.precision=bf16-mixed"], "choose 32-true"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    arguments: list[str], message: str, trained: Path, script_here: ScriptHere
) -> None:
    checkpoint = f"checkpoint={trained}/pointwise_0/checkpoint.ckpt"
    code, errors = script_here("quantize", checkpoint, *QUICK, *arguments, "hydra.run.dir=run")
    assert code == 1
    assert any(message in line for line in errors.splitlines()), errors


def test_a_checkpoint_that_is_not_there(script_here: ScriptHere) -> None:
    code, errors = script_here("quantize", "checkpoint=nowhere/*.ckpt", "logger=none")
    assert code == 1
    assert "no such file; train one" in errors


def test_a_float_checkpoint_has_no_int8(trained: Path) -> None:
    with pytest.raises(ValueError, match="is a float checkpoint; quantize it first"):
        load(trained / "pointwise_0" / "checkpoint.ckpt", "int8")


def test_a_sweep_over_bits_and_the_schemes(
    trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    checkpoint = f"checkpoint={trained}/bbb_0/checkpoint.ckpt"
    arguments = ["-m", checkpoint, "quant=default,paper", "quant.weight_bits=3,8", *QUICK]
    code, errors = script_here("quantize", *arguments, "plots=false", "hydra.sweep.dir=sweep")
    assert code == 0, errors
    nll = {}
    for path in (tmp_path / "sweep").glob("*/metrics.json"):
        quant = yaml.safe_load((path.parent / "config.yaml").read_text())["quant"]
        nll[quant["name"], quant["weight_bits"]] = json.loads(path.read_text())["int8/test/nll"]
    assert len(nll) == 4
    assert nll["default", 3] < nll["paper", 3]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in AFTER_TRAINING])
def test_training_can_be_quantization_aware_from_the_start(
    method: str, script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [f"method={method}", "quant=default", "trainer.max_epochs=3", "logger=none"]
    arguments += [] if method == "pointwise" else ["method.num_samples=2"]
    if method == "sghmc":
        arguments += ["method.burn_in=1", "method.collect_every=1"]
    code, errors = script_here("train", *arguments, "plots=false", "hydra.run.dir=run")
    assert code == 0, errors
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["int8/test/nll"] == pytest.approx(metrics["test/nll"], abs=0.01)
    assert load(tmp_path / "run" / "checkpoint.ckpt").recipe["stage"] == "qat"


@pytest.mark.parametrize("method", AFTER_TRAINING)
def test_a_posterior_set_after_the_training_is_quantized_after_it(
    method: str, script_here: ScriptHere, tmp_path: Path
) -> None:
    code, errors = script_here("train", f"method={method}", "quant=default", "hydra.run.dir=run")
    assert code == 1
    assert "train with quant=none, then quantize the checkpoint" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["bbb", "sghmc"])
def test_a_control_is_the_same_fine_tuning_without_rounding(
    method: str, trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    checkpoint = f"checkpoint={trained}/{method}_0/checkpoint.ckpt"
    options = ["quant.control=true", "quant.fine_tuning.optimizer.lr=0.01", "plots=false", *QUICK]
    for bits in (8, 2):
        bits_and_folder = [f"quant.weight_bits={bits}", f"hydra.run.dir=w{bits}"]
        code, errors = script_here("quantize", checkpoint, *options, *bits_and_folder)
        assert code == 0, errors
    metrics = [json.loads((tmp_path / f"w{bits}/metrics.json").read_text()) for bits in (8, 2)]
    controls = [{k: v for k, v in of.items() if k.startswith("finetuned/")} for of in metrics]
    assert controls[0] == controls[1]  # bits play no part in it
    assert controls[0]["finetuned/test/nll"] != metrics[0]["float/test/nll"]
    first, second = (of["unquantized/test/nll"] for of in metrics)
    assert first != second

    assert not (tmp_path / "w2/finetuned/checkpoint.ckpt").exists()
    control = load(tmp_path / "w2/finetuned/control.ckpt", "unquantized")
    assert control.recipe is not None
    data = make_data({**control.recipe, "data_dir": "data"})
    samples = control.predictive(data.normalize(data.test.inputs))
    nll = score(Prediction(control.likelihood, samples, data.test.targets))["nll"]
    assert nll == pytest.approx(controls[1]["finetuned/test/nll"], rel=1e-6)


def test_a_resumed_job_tells_the_times_of_the_control_that_it_trained(
    trained: Path, script_here: ScriptHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("bqnn.commands.quantize.say", said.append)
    arguments = [f"checkpoint={trained}/bbb_0/checkpoint.ckpt", "quant.control=true", *QUICK]
    arguments += ["plots=false", "hydra.run.dir=run"]
    assert script_here("quantize", *arguments)[0] == 0
    times = r"first step after [0-9.]+ s, 2 epochs of \S+ s \(median\)"
    assert re.search(f"^{times}\nwithout rounding: {times}$", said[-1], re.MULTILINE)

    (tmp_path / "run/finetuned/control.ckpt").unlink()
    (tmp_path / "run/metrics.json").unlink()
    status = tmp_path / "run/status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "INTERRUPTED"}))
    code, errors = script_here("quantize", *arguments, "resume=true")
    assert code == 0, errors
    assert re.search(f"^no training step\nwithout rounding: {times}$", said[-1], re.MULTILINE)


def test_a_control_is_refused_in_a_calibration(
    trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    checkpoint = f"checkpoint={trained}/sghmc_0/checkpoint.ckpt"
    arguments = ["quant.mode=ptq", "quant.control=true", "hydra.run.dir=run"]
    code, errors = script_here("quantize", checkpoint, *arguments)
    assert code == 1
    assert "quant.control=true: quant.mode=ptq trains nothing" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["bbb", "sghmc"])
def test_a_calibration_fits_integers_and_biases(
    method: str, trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    checkpoint = f"checkpoint={trained}/{method}_0/checkpoint.ckpt"
    fitted = ["quant.weight_rounding=adaptive", "quant.bias_correction=true"]
    differences = []
    for run, options in (("plain", []), ("fitted", fitted)):
        arguments = [checkpoint, "quant.mode=ptq", "quant.weight_bits=3", "logger=none"]
        code, errors = script_here("quantize", *arguments, *options, f"hydra.run.dir={run}")
        assert code == 0, errors
        metrics = json.loads((tmp_path / run / "metrics.json").read_text())
        assert metrics["int8/test/nll"] == metrics["simulated/test/nll"]
        differences.append(abs(metrics["int8/test/nll"] - metrics["float/test/nll"]))
        with (tmp_path / run / "quantization.csv").open() as file:
            moved = [float(row["moved_share"]) for row in csv.DictReader(file)]
        assert (max(moved) > 0) == bool(options)
    assert differences[1] < differences[0]

    folder = tmp_path / "fitted"
    model = load(folder / "checkpoint.ckpt", "int8")
    data = make_data(yaml.safe_load((folder / "config.yaml").read_text()))
    samples = model.predictive(data.normalize(data.test.inputs))
    assert np.array_equal(samples.numpy(), np.load(folder / "predictions.npz")["samples"])


@pytest.mark.parametrize("method", ["sghmc", "bbb"])
def test_a_fine_tuning_that_imitates_learns_other_weights_than_from_targets(
    method: str, trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    nlls = []
    for imitate in ("true", "false"):
        arguments = [f"checkpoint={trained}/{method}_0/checkpoint.ckpt", "plots=false", *QUICK]
        arguments += [f"quant.fine_tuning.imitate={imitate}", f"hydra.run.dir=run_{imitate}"]
        code, errors = script_here("quantize", *arguments)
        assert code == 0, errors
        metrics = json.loads((tmp_path / f"run_{imitate}" / "metrics.json").read_text())
        assert metrics["int8/test/nll"] == metrics["simulated/test/nll"]
        nlls.append(metrics["int8/test/nll"])
    assert nlls[0] != nlls[1]
