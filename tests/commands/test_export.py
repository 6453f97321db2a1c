"""bqnn export run for real: the files that it leaves, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bqnn.checkpoints.calibrated import save_calibrated
from bqnn.inference.calibration import TemperatureScaling
from bqnn.methods import METHODS

ScriptHere = Callable[..., tuple[int, str]]
Export = Callable[..., tuple[int, str]]
FILES = {"model.onnx", "verification.json", "card.md", "card.json", "status.json"}


@pytest.fixture
def export(program_here: Callable[..., tuple[int, str]]) -> Export:
    """Run `bqnn export *arguments` in this process: the exit code and stderr."""
    return partial(program_here, "export")


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def call_without_bqnn(folder: Path) -> str:
    """What the Python of the card prints, in a process that starts beside the file."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "card.md").read_text(), re.M | re.S)
    assert len(code.splitlines()) <= 10
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exported_verified_and_described(
    method: str, trained: Path, script_here: ScriptHere, export: Export, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    arguments = [f"checkpoint={trained}/{method}_0", "quant.mode=ptq", "logger=none"]
    assert script_here("quantize", *arguments, "plots=false", "hydra.run.dir=int8")[0] == 0
    code, errors = export("checkpoint=int8", "hydra.run.dir=out")
    assert code == 0, errors
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= FILES
    record, card = read(out / "verification.json"), read(out / "card.json")
    draws = {"pointwise": 1, "sghmc": 2}.get(method, 3)
    assert (record["rows"], record["num_samples"], record["differing"]) == (364, draws, 0)
    assert record["outputs"] == 364 * draws * 10
    metrics = read(tmp_path / "int8" / "metrics.json")
    if method != "mcdropout":  # there, each row has its own mask
        for name in ("error", "nll", "mi"):
            found = record["metrics"][f"onnx/{name}"]
            assert found == pytest.approx(metrics[f"int8/test/{name}"], abs=1e-9)
            assert card["metrics"][name]["value"] == found
    assert card["bytes"]["file"] == (out / "model.onnx").stat().st_size
    measured = {each["num_samples"]: each["latencies"] for each in card["speed"]["draws"]}
    counts = {"pointwise": [1], "sghmc": [1, 2], "ensemble": [1, 3, 5]}
    assert list(measured) == counts.get(method, [1, 3, 5, 20])
    assert [each["batch_size"] for each in measured[draws]] == [1, 32, 256]
    assert call_without_bqnn(out)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_no_integer_differs_at_any_bits(
    method: str, trained: Path, script_here: ScriptHere, export: Export, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    quick = ["quant.mode=ptq", "quant.activation_bits=7", "logger=none", "plots=false"]
    for bits in (8, 4, 2):
        arguments = [f"checkpoint={trained}/{method}_0", f"quant.weight_bits={bits}", *quick]
        assert script_here("quantize", *arguments, f"hydra.run.dir=int8/{bits}")[0] == 0
    code, errors = export("checkpoint=int8/*/checkpoint.ckpt", "hydra.run.dir=out")
    assert code == 0, errors
    records = [read(path) for path in (tmp_path / "out").glob("*/verification.json")]
    assert [(r["rows"], r["differing"]) for r in records] == [(364, 0)] * 3


def test_a_table_is_read_in_its_units(
    script_here: ScriptHere, export: Export, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    generator = np.random.default_rng(0)
    sizes, rooms = generator.uniform(20, 200, 300), generator.integers(1, 8, 300)
    prices = 3000 * sizes + 10_000 * rooms + generator.normal(0, 20_000, 300)
    lines = ["size,rooms,price"]
    lines += [f"{s:.1f},{r},{p:.0f}" for s, r, p in zip(sizes, rooms, prices, strict=True)]
    (tmp_path / "flats.csv").write_text("\n".join(lines) + "\n")
    arguments = ["method=bbb", "task=table", "task.file=flats.csv", "task.target=price"]
    arguments += ["trainer.max_epochs=3", "logger=none", "plots=false", "hydra.run.dir=float"]
    assert script_here("train", *arguments)[0] == 0
    quick = ["quant.mode=ptq", "logger=none", "plots=false", "hydra.run.dir=int8"]
    assert script_here("quantize", "checkpoint=float", *quick)[0] == 0
    code, errors = export("checkpoint=int8", "num_samples=4", "hydra.run.dir=out")
    assert code == 0, errors
    assert read(tmp_path / "out" / "verification.json")["differing"] == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    names = [output.name for output in session.get_outputs()]
    assert names == ["samples", "mean", "std", "aleatoric_std", "epistemic_std"]
    rows = np.array([[30.0, 1.0], [190.0, 7.0]])
    values = dict(zip(names, session.run(names, {"inputs": rows}), strict=True))
    assert values["samples"].shape == (4, 2, 2)
    import bqnn

    answer = bqnn.load(tmp_path / "int8", "int8").predict(rows, num_samples=4)
    np.testing.assert_allclose(values["mean"], answer.mean, rtol=1e-9)
    np.testing.assert_allclose(values["epistemic_std"], answer.epistemic, rtol=1e-9)
    assert call_without_bqnn(tmp_path / "out")


def test_the_form_for_hardware(quantized: Path, export: Export, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    code, errors = export(f"checkpoint={quantized}", "form=qdq", "hydra.run.dir=out")
    assert code == 0, errors
    assert read(tmp_path / "out" / "verification.json")["form"] == "qdq"
    assert "in the form `qdq`" in (tmp_path / "out" / "card.md").read_text()


def test_masks_drawn_by_the_file(
    trained: Path, script_here: ScriptHere, export: Export, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    quick = ["quant.mode=ptq", "logger=none", "plots=false", "hydra.run.dir=int8"]
    assert script_here("quantize", f"checkpoint={trained}/mcdropout_0", *quick)[0] == 0
    code, errors = export("checkpoint=int8", "masks=random", "hydra.run.dir=out")
    assert code == 0, errors
    record = read(tmp_path / "out" / "verification.json")
    assert (record["masks"], record["differing"]) == ("random", 0)
    kinds = {"kept", "equal_in_two_rows", "equal_in_two_draws"}
    assert {k for k, e in record["random_masks"].items() if abs(e["standard_score"]) < 6} == kinds
    text = (tmp_path / "out" / "card.md").read_text()
    assert "0 differ from bqnn's int8, which gets the masks that the file draws" in text
    assert call_without_bqnn(tmp_path / "out")


def test_a_file_that_differs_is_a_failure(
    quantized: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    from bqnn.quant.onnx.exact import ExactForm
    from bqnn.quant.onnx.values import Value

    def wrong(self: ExactForm, x: Value) -> str:
        assert x.integers is not None  # the zero point is left out
        scale = self.graph.constant(np.float32(x.integers.scale))
        return self.graph.call("Mul", self.graph.cast(x.name, np.float32), scale)

    monkeypatch.setattr(ExactForm, "leave", wrong)
    code, errors = export(f"checkpoint={quantized}", "hydra.run.dir=out")
    assert code == 1
    (line,) = errors.splitlines()
    assert "outputs differ from int8, by up to" in line
    out = tmp_path / "out"
    assert read(out / "status.json")["state"] == "FAILED"
    assert read(out / "verification.json")["differing"] > 0
    assert not (out / "model.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["num_samples=0"], "num_samples=0"),
        (["format=tflite"], "format=tflite: choose onnx"),
        (["form=fast"], "form=fast: choose exact or qdq"),
        (["masks=new"], "masks=new: choose fixed or random"),
        (["masks=random"], "masks=random: the network has no MC dropout"),
        (["trainer.accelerator=gpu"], "trainer.accelerator=gpu"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    arguments: list[str], message: str, quantized: Path, export: Export, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    code, errors = export(f"checkpoint={quantized}", *arguments, "hydra.run.dir=out")
    assert code == 1
    (line,) = errors.splitlines()
    assert line.startswith("bqnn export: ")
    assert message in line


def test_a_float_checkpoint_is_refused(trained: Path, export: Export) -> None:
    pytest.importorskip("onnxruntime")
    code, errors = export(f"checkpoint={trained}/bbb_0", "hydra.run.dir=out")
    assert code == 1
    assert "quantize the checkpoint first (bqnn quantize" in errors


def test_a_calibration_goes_into_the_file(quantized: Path, export: Export, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from bqnn import load
    from bqnn.quant.onnx.session import start_session

    calibrated = tmp_path / "calibrated.ckpt"
    save_calibrated(quantized / "checkpoint.ckpt", calibrated, TemperatureScaling(2.0))
    code, errors = export("checkpoint=calibrated.ckpt", "hydra.run.dir=out")
    assert code == 0, errors
    out = tmp_path / "out"
    card, record = read(out / "card.json"), read(out / "verification.json")
    assert card["calibration"] == {"name": "temperature", "temperature": 2.0}
    assert "Its predictions are calibrated (temperature)." in (out / "card.md").read_text()
    assert record["differing"] == 0
    assert card["metrics"]["nll"]["value"] == record["metrics"]["onnx/nll"]

    model = load(calibrated, numeric="int8")
    image = np.full((1, 1, 8, 8), 7, np.uint8)  # a row alone has the masks of the file
    answer = model.predict(image, num_samples=record["num_samples"])
    session = start_session((out / "model.onnx").read_bytes(), 1)
    (probabilities,) = session.run(["probabilities"], {"inputs": image})
    np.testing.assert_allclose(probabilities, answer.probabilities, rtol=1e-5)


def test_a_damaged_checkpoint_is_refused(quantized: Path, export: Export, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    content = (quantized / "checkpoint.ckpt").read_bytes()
    (tmp_path / "damaged.ckpt").write_bytes(content[: len(content) // 2])
    code, errors = export("checkpoint=damaged.ckpt", "hydra.run.dir=out")
    assert code == 1
    (line,) = errors.splitlines()
    assert "cannot be read as a checkpoint" in line


def test_missing_packages_are_named_before_any_work(
    quantized: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bqnn.quant.onnx.session.find_spec", lambda name: None)
    code, errors = export(f"checkpoint={quantized}", "hydra.run.dir=out")
    assert code == 1
    (line,) = errors.splitlines()
    assert line == (
        "bqnn export: format=onnx: onnx and onnxruntime must be installed; "
        "run: pip install 'bqnn[onnx]'"
    )
    assert not (tmp_path / "out").exists()


def test_a_pattern_is_exported_in_parts(quantized: Path, export: Export, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for name in ("a", "b"):
        (tmp_path / "all" / name).mkdir(parents=True)
        shutil.copy(quantized / "checkpoint.ckpt", tmp_path / "all" / name)
    arguments = ["checkpoint=all/*/checkpoint.ckpt", "num_samples=1", "hydra.run.dir=out"]
    code, errors = export(*arguments)
    assert code == 0, errors
    for part in ("0_bbb_digits", "1_bbb_digits"):
        assert {path.name for path in (tmp_path / "out" / part).iterdir()} >= FILES
