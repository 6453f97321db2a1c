"""Two gloo processes train one model: the same as one process would, and the same on both."""

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir

from bqnn.config import CONF, plain
from bqnn.methods import METHODS
from bqnn.quant.callback import QuantizationCallback
from bqnn.quant.spec import QuantSpec
from bqnn.recipe import load
from bqnn.run import Job
from bqnn.trainer import make_trainer

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "ranks" / "worker.py"
worker: Any = runpy.run_path(str(WORKER))  # the same models, to be trained by one process here


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What each of the two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), rank, port, str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second


@pytest.mark.parametrize(
    "name", [*METHODS, *(f"{name} quantized" for name in METHODS), "batch norm"]
)
def test_ranks_end_bit_equal(name: str, both: tuple[dict, dict]) -> None:
    first, second = (seen[name]["state"] for seen in both)
    assert first.keys() == second.keys()
    differing = [key for key in first if not torch.equal(first[key], second[key])]
    assert differing == []
    assert both[0][name]["metrics"] == pytest.approx(both[1][name]["metrics"], nan_ok=False, abs=0)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["pointwise", "bbb", "sghmc"])
def test_two_ranks_train_what_one_process_would(
    name: str, quantized: bool, both: tuple[dict, dict]
) -> None:
    """Equal batches, KL, noise of the sampler, ranges: all but the order of sums."""
    data = worker["rows"](worker["GLOBAL_BATCH"])
    callbacks = [QuantizationCallback(QuantSpec(), freeze_epochs=1)] if quantized else []
    alone = worker["fit"](worker["make"](name, data), data, callbacks)
    together = both[0][f"{name} quantized" if quantized else name]
    # A weight next to a tie may be rounded the other way.
    tolerance = 2e-2 if quantized else 1e-5
    for key, value in alone["state"].items():
        torch.testing.assert_close(together["state"][key], value, atol=tolerance, rtol=tolerance)
    assert together["metrics"] == pytest.approx(alone["metrics"], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_metrics_are_those_of_one_process_on_the_same_weights(
    name: str, both: tuple[dict, dict]
) -> None:
    data = worker["rows"](worker["GLOBAL_BATCH"])
    method = worker["make"](name, data)
    method.load_state_dict(both[0][name]["state"])
    alone = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (metrics,) = alone.test(method, datamodule=data, verbose=False)
    found = both[0][name]["metrics"]
    assert {key: found[key] for key in metrics} == metrics


@pytest.mark.slow
def test_train_py_with_two_processes_leaves_one_set_of_files(
    script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    arguments = ["trainer=ddp", "trainer.accelerator=cpu", "task=synthetic", "method=sghmc"]
    arguments += ["quant=default", "trainer.max_epochs=4", "trainer.save_best=true"]
    arguments += ["method.burn_in=1", "method.collect_every=1", "logger=wandb", "plots=false"]
    result = script("train", *arguments, "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    assert json.loads((run / "status.json").read_text())["state"] == "DONE"
    assert {path.name for path in run.iterdir()} <= {
        *("best.ckpt", "checkpoint.ckpt", "config.yaml", "metrics.csv", "metrics.json"),
        *("predictions.npz", "status.json", "train.log", "wandb"),
    }
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    assert result.stdout.count("results in") == 1
    load(run / "checkpoint.ckpt", "int8")

    result = script("train", *arguments, "method.optimizer.lr=1e6", "hydra.run.dir=failed")
    assert result.returncode == 1
    status = json.loads((tmp_path / "failed" / "status.json").read_text())
    assert status["state"] == "FAILED"
    assert "at step" in status["error"]


@pytest.mark.parametrize(("verb", "sweep"), [("quantize", None), ("train", "sweep")])
def test_several_processes_are_for_a_single_training(
    verb: str, sweep: str | None, tmp_path: Path
) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = plain(compose("train", ["trainer=ddp", "trainer.accelerator=cpu"]))
    job = Job(tmp_path, verb, sweep)
    job.config = config
    with pytest.raises(ValueError, match=r"trainer\.devices=2: .* a single run of train\.py"):
        make_trainer(job, [], [], validate=False)
