"""quantize.py with quant.budget: bits of each layer within a limit, in the recipe and the files."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bqnn.checkpoints.recipe import load
from bqnn.commands import budget as step
from bqnn.methods import METHODS

ScriptHere = Callable[..., tuple[int, str]]
QUICK = ["logger=none", "plots=false", "num_samples=2", "quant.fine_tuning.max_epochs=1"]
QUICK += ["quant.fine_tuning.calibration_batches=1", "quant.budget.widths=[2,4,8]"]
QUICK += ["quant.budget.rows=20"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _float_parameters(trained: Path, method: str) -> list[Any]:
    net: Any = load(trained / f"{method}_0" / "checkpoint.ckpt").net
    members = net.members if hasattr(net, "members") else [net]
    return [parameter for member in members for parameter in member.parameters()]


def mean_bits(run: Path) -> float:
    rows = read(run / "quantization.csv")
    sizes = [1] * len(rows)
    for number, row in enumerate(rows):
        for side in row["shape"].split("x"):
            sizes[number] *= int(side)
    bits = [int(row["weight_bits"]) for row in rows]
    return sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)


FAST = ("bbb", "mcdropout")


@pytest.mark.parametrize(
    "method",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_every_method_keeps_within_a_budget(
    method: str, trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [f"checkpoint={trained}/{method}_0/checkpoint.ckpt", "quant.mode=ptq", *QUICK]
    arguments = [each for each in arguments if method != "pointwise" or "samples" not in each]
    arguments += ["quant.budget.mean_bits=3.5", "hydra.run.dir=run"]
    code, errors = script_here("quantize", *arguments)
    assert code == 0, errors
    assert 2 < mean_bits(tmp_path / "run") <= 3.5
    recipe = load(tmp_path / "run" / "checkpoint.ckpt", "int8").recipe
    assert recipe is not None
    bits = {entry["layer"]: entry["weight_bits"] for entry in recipe["quant"]["overrides"]}
    for row in read(tmp_path / "run" / "quantization.csv"):
        layer = row["layer"]
        layer = layer.split(".", 2)[2] if layer.startswith("members.") else layer
        assert row["tensor"] == "sigma" or int(row["weight_bits"]) == bits[layer]


@pytest.mark.parametrize(("method", "share"), [("pointwise", 0.3), ("sghmc", 0.55)])
def test_the_packed_size_is_within_a_budget_of_bytes(
    method: str, share: float, trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [f"checkpoint={trained}/{method}_0/checkpoint.ckpt", "quant.mode=ptq", *QUICK]
    arguments = [each for each in arguments if method != "pointwise" or "samples" not in each]
    size = 4 * sum(parameter.numel() for parameter in _float_parameters(trained, method))
    most = int(share * size / 4)
    run = [f"quant.budget.bytes={most}", "hydra.run.dir=run"]
    code, errors = script_here("quantize", *arguments, *run)
    assert code == 0, errors
    packed = json.loads((tmp_path / "run" / "size.json").read_text())["packed_bytes"]
    assert 0.8 * most < packed <= most


@pytest.mark.parametrize("measure", ["mi", pytest.param("auroc", marks=pytest.mark.slow)])
def test_a_fine_tuning_has_the_chosen_bits_of_weights_and_activations(
    measure: str, trained: Path, script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [f"checkpoint={trained}/bbb_0/checkpoint.ckpt", *QUICK, "plots=true"]
    limits = ["quant.budget.mean_bits=4", "quant.budget.mean_activation_bits=6"]
    limits += [f"quant.budget.measure={measure}", "hydra.run.dir=run"]
    code, errors = script_here("quantize", *arguments, *limits)
    assert code == 0, errors
    run = tmp_path / "run"
    assert (run / "sensitivity.png").exists()
    rows = read(run / "sensitivity.csv")
    assert {row["tensor"] for row in rows} == {"mean", "sigma", "output", "all", "float"}
    assert {bool(row["auroc"]) for row in rows} == {measure == "auroc"}
    assert mean_bits(run) <= 4
    net: Any = load(run / "checkpoint.ckpt").net
    quants = {n: m.output_quant.bits for n, m in net.named_modules() if hasattr(m, "output_quant")}
    values = {row["layer"]: int(row["values"]) for row in rows if row["tensor"] == "output"}
    total = sum(quants[layer] * count for layer, count in values.items())
    assert total / sum(values.values()) <= 6
    assert quants["output.heads.0.linear"] == 8  # quant.output_bits


def test_a_resumed_job_has_the_same_bits(
    trained: Path, script_here: ScriptHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"checkpoint={trained}/bbb_0/checkpoint.ckpt", *QUICK]
    arguments += ["quant.budget.mean_bits=3", "quant.mode=ptq", "hydra.run.dir=run"]
    assert script_here("quantize", *arguments)[0] == 0
    run = tmp_path / "run"
    names = ("sensitivity.csv", "metrics.json", "quantization.csv")
    before = [(run / name).read_bytes() for name in names]

    def killed() -> None:
        status = json.loads((run / "status.json").read_text())
        (run / "status.json").write_text(json.dumps({**status, "state": "RUNNING", "end": None}))
        for name in ("checkpoint.ckpt", *names[1:]):
            (run / name).unlink()

    killed()
    cut = before[0].rpartition(b"\n")[0].rpartition(b"\n")[0] + b"\n"  # without its last line
    (run / names[0]).write_bytes(cut)
    assert script_here("quantize", *arguments, "resume=true")[0] == 0
    assert [(run / name).read_bytes() for name in names] == before

    killed()
    monkeypatch.setattr(step, "measure_sensitivity", None)  # it is read from the file
    assert script_here("quantize", *arguments, "resume=true")[0] == 0
    assert [(run / name).read_bytes() for name in names] == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["mean_bits=1"], "quant.budget.mean_bits=1: choose null, or a finite number, 2 or more"),
        (["mean_bits=9"], "quant.budget.mean_bits=9: choose"),
        (["mean_bits=x"], "quant.budget.mean_bits=x: choose"),
        (["bytes=0"], "quant.budget.bytes=0: choose"),
        (["bytes=1.5"], "quant.budget.bytes=1.5: choose"),
        (["bytes=9"], "quant.budget.bytes=9: the smallest that this network reaches with the"),
        (["mean_bits=3", "widths=[]"], "quant.budget.widths=[]: choose at least one whole number"),
        (["mean_bits=3", "widths=[9]"], "quant.budget.widths=[9]: choose at least one"),
        (["mean_bits=3", "widths=[4,8]"], "quant.budget.mean_bits=3: the smallest that"),
        (["mean_bits=3", "rows=0"], "quant.budget.rows=0: choose"),
        (
            ["mean_bits=3", "measure=error"],
            "quant.budget.measure=error: choose nll or kl or mi",
        ),
        (["mean_bits=3", "measure=mi"], "quant.budget.measure=mi: one draw has no mutual"),
        (
            ["mean_bits=3", "other=mnist"],
            "quant.budget.other=mnist: quant.budget.measure=nll needs",
        ),
        (["mean_bits=3", "measure=auroc", "other=mnist"], "quant.budget.other: no set 'mnist' for"),
        (["measure=auroc"], "quant.budget.measure=auroc: there is no limit; set"),
        (["other=uniform"], "quant.budget.other=uniform: there is no limit; set"),
        (["mean_bits=3", "size=3"], "quant.budget.size"),
        ("quant.budget=3", "quant.budget"),
        ("quant.budget=null", "quant.budget"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    options: list[str] | str, said: str, trained: Path, script_here: ScriptHere
) -> None:
    given = [options] if isinstance(options, str) else [f"quant.budget.{each}" for each in options]
    checkpoint = f"checkpoint={trained}/pointwise_0/checkpoint.ckpt"
    quick = ["logger=none", "plots=false", "quant.mode=ptq", "quant.budget.rows=5"]
    code, errors = script_here("quantize", checkpoint, *quick, *given, "hydra.run.dir=run")
    assert code == 1
    assert any(said in line for line in errors.splitlines()), errors


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("quant.overrides=[{layer: output.*, weight_bits: 8}]", "quant.overrides: quant.budget"),
        ("quant.sigma_bits=4", "quant.sigma_bits: quant.budget chooses the bits"),
    ],
)
def test_other_choices_of_bits_are_refused(
    option: str, said: str, trained: Path, script_here: ScriptHere
) -> None:
    arguments = [f"checkpoint={trained}/bbb_0/checkpoint.ckpt", "quant.budget.mean_bits=3", option]
    code, errors = script_here("quantize", *arguments, "logger=none", "hydra.run.dir=run")
    assert code == 1
    assert said in errors


def test_a_training_has_no_budget(script_here: ScriptHere, tmp_path: Path) -> None:
    arguments = ["quant=default", "quant.budget.mean_bits=3", "logger=none", "hydra.run.dir=run"]
    code, errors = script_here("train", *arguments)
    assert code == 1
    assert "quant.budget: it needs a trained network; train with quant=none" in errors
    assert not (tmp_path / "run").exists()


def test_without_validation_rows_there_is_nothing_to_choose_by(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = ["method=pointwise", "task=digits", "task.validation_share=0", "trainer=smoke"]
    assert script_here("train", *arguments, "logger=none", "hydra.run.dir=f")[0] == 0
    arguments = ["checkpoint=f/checkpoint.ckpt", "quant.budget.mean_bits=3", "logger=none"]
    code, errors = script_here("quantize", *arguments, "hydra.run.dir=q")
    assert code == 1
    assert "quant.budget: it is fitted on validation rows, and the training kept none" in errors
