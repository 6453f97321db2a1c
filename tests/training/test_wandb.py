"""W&B's view of each job, read from its offline run by `wandb leet inspect`."""

import contextlib
import csv
import json
import runpy
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["method=mcdropout", "method.num_samples=3", "trainer.max_epochs=3", "seed=4"]
INSPECT = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]


@cache
def inspect(folder: Path, *options: str) -> str:
    """Return the output of `wandb leet inspect` for the one run below a job's folder."""
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    result = subprocess.run([*INSPECT, *options, str(log)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def summary(folder: Path) -> dict[str, Any]:
    return json.loads(inspect(folder, "--summary"))


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, inspect(folder).splitlines())
    return [line[kind] for line in lines if line["type"] == kind]


def sweep_arguments() -> tuple[dict[str, Any], list[str]]:
    """Return docs/wandb_sweep.yaml, and what its agent passes to the first of its jobs."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    assert "${args_no_hyphens}" in create_sweep_command(sweep["command"])
    choices = {
        name: [options["value"]] if "value" in options else options["values"]
        for name, options in sweep["parameters"].items()
    }
    assert len(list(product(*choices.values()))) == 14  # seven widths, two modes
    chosen = {name: {"value": values[0]} for name, values in choices.items()}
    chosen["checkpoint"] = {"value": "float/checkpoint.ckpt"}
    return sweep, create_sweep_command_args({"args": chosen})["args_no_hyphens"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with a training, its quantization twice, and a failed training."""
    usage = subprocess.run([*INSPECT, "--help"], capture_output=True, text=True).stdout
    if "inspect [OPTIONS]" not in usage:
        pytest.skip("this wandb has no `leet inspect`, and we parse no file of its own")
    folder = tmp_path_factory.mktemp("project")
    quick = ["checkpoint=float/checkpoint.ckpt", "logger.artifacts=true", "plots=false"]
    int8 = ["numeric=int8", "suite=test"]
    jobs = [
        ["train", *SHORT, "logger.artifacts=true", "hydra.run.dir=float"],
        ["quantize", *sweep_arguments()[1], "logger.artifacts=true", "hydra.run.dir=ptq"],
        ["quantize", "-m", *quick, "quant.fine_tuning.max_epochs=1", "hydra.sweep.dir=qat"],
        ["evaluate", "checkpoint=ptq/checkpoint.ckpt", *quick[1:], *int8, "hydra.run.dir=evaluate"],
        ["train", *SHORT, "method.optimizer.lr=1e30", "hydra.run.dir=failed"],
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DATA_DIR", str(folder / "wandb_data"))
        for verb, *arguments in jobs:
            patch.setattr(sys, "argv", [f"{verb}.py", *arguments])
            with contextlib.suppress(SystemExit):  # the one that fails
                runpy.run_path(str(ROOT / f"{verb}.py"), run_name="__main__")
    return folder


JOBS = [
    ("float", "mcdropout-digits-float-s4", "float", None),
    ("ptq", "mcdropout-digits-w2a7-s4", "ptq", "bits"),
    ("qat/0_qat_w8a7", "mcdropout-digits-w8a7-s4", "qat", "qat"),
    ("evaluate", "mcdropout-digits-w2a7-s4", "evaluate", None),
]


@pytest.mark.parametrize(("folder", "name", "job_type", "group"), JOBS)
def test_every_job_is_a_run_with_its_configuration(
    folder: str, name: str, job_type: str, group: str | None, project: Path
) -> None:
    run = project / folder
    shown, record = summary(run), records(run, "run")[0]
    assert (shown["name"], record["job_type"], record.get("run_group")) == (name, job_type, group)
    assert shown["tags"] == ["mcdropout", "digits"]
    assert shown["config"] == yaml.safe_load((run / "config.yaml").read_text())
    assert (shown["state"], shown["exit_code"]) == ("finished", 0)
    metrics = records(run, "metric")
    assert [m["step_metric"] for m in metrics if m.get("glob_name") == "*"] == ["epoch"]
    assert [m["options"]["hidden"] for m in metrics if m.get("name") == "epoch"] == [True]
    final = json.loads((run / "metrics.json").read_text())
    assert {key: shown["summary"][key] for key in final} == pytest.approx(final)
    assert shown["summary"]["most_uncertain"]["nrows"] == 50


def test_a_training_logs_metrics_and_figures(project: Path) -> None:
    run = project / "float"
    shown = summary(run)["summary"]
    assert shown["time/epoch_seconds"] > 0
    figures = {key: value["_type"] for key, value in shown.items() if key.startswith("plots/")}
    names = ("curves", "reliability", "confidence")
    assert figures == dict.fromkeys((f"plots/{name}" for name in names), "images/separated")
    epochs = [record["item"] for record in records(run, "history")]
    assert [item["epoch"] for item in epochs if "train/nll" in item] == [0, 1, 2]
    curves: dict[str, list[float]] = {}
    for item in epochs:
        for name, value in item.items():
            # Other entries are W&B's own, and its descriptions of images and tables.
            if isinstance(value, int | float) and name[0] != "_" and "." not in name:
                curves.setdefault(name, []).append(value)
    assert {"train/loss", "val/nll", "epoch"} <= curves.keys()
    assert [name for name, values in curves.items() if len(set(values)) == 1] == []


def test_a_quantization_logs_sizes_and_layers(project: Path) -> None:
    run = project / "ptq"
    shown = summary(run)["summary"]
    size = json.loads((run / "size.json").read_text())
    assert {name: shown[f"size/{name}"] for name in size} == size
    layers = logged_table(run, "quantization")
    with (run / "quantization.csv").open() as file:
        assert layers["columns"] == next(csv.reader(file))
        assert [row[0] for row in layers["data"]] == [line.partition(",")[0] for line in file]
    assert sweep_arguments()[0]["metric"]["name"] in shown


def test_the_most_uncertain_images_come_first(project: Path) -> None:
    table = logged_table(project / "float", "most_uncertain")
    assert table["columns"][:4] == ["image", "truth", "prediction", "entropy"]
    images, truth, prediction, entropy, *_ = zip(*table["data"], strict=True)
    assert {(p["_type"], p["width"], p["height"]) for p in images} == {("image-file", 64, 64)}
    assert {*truth, *prediction} <= set("0123456789")

    kept = np.load(project / "float" / "predictions.npz")
    logits = torch.from_numpy(kept["samples"]).double()
    expected = torch.special.entr(logits.softmax(-1).mean(0)).sum(-1)
    assert entropy == pytest.approx(expected.topk(50).values.tolist())
    worst = int(expected.argmax())
    assert truth[0] == str(kept["targets"][worst])


def test_a_quantized_checkpoint_comes_from_the_one_that_training_made(project: Path) -> None:
    (trained,) = models(project / "float")
    for folder, bits in (("ptq", "w2a7"), ("qat/0_qat_w8a7", "w8a7")):
        used, made = models(project / folder)
        assert used["use_after_commit"]
        assert used["name"] == trained["name"] == "mcdropout-digits-float-s4"
        assert used["digest"] == trained["digest"]  # so one version, made there and used here
        assert made["name"] == f"mcdropout-digits-{bits}-s4"
        assert "use_after_commit" not in made
    (evaluated,) = models(project / "evaluate")
    _, made = models(project / "ptq")
    assert (evaluated["name"], evaluated["digest"]) == (made["name"], made["digest"])
    assert evaluated["use_after_commit"]


def test_a_failed_job_shows_as_failed_and_keeps_no_artifact(project: Path) -> None:
    shown = summary(project / "failed")
    assert (shown["state"], shown["exit_code"]) == ("failed", 1)
    assert models(project / "failed") == []


def logged_table(folder: Path, name: str) -> dict[str, Any]:
    """Return a logged table, which is an artifact together with its images."""
    (entries,) = (
        record["manifest"]["contents"]
        for record in records(folder, "artifact")
        if record["name"].endswith(f"-{name}")
    )
    paths = {entry["path"]: Path(entry["local_path"]) for entry in entries}
    return json.loads(paths[f"{name}.table.json"].read_text())


def models(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder, "artifact") if record["type"] == "model"]
