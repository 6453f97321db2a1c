"""Two gloo processes train one model, equal to each other and to a single process."""

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
from pytorch_lightning.utilities import rank_zero_only

from bqnn.checkpoints.recipe import load
from bqnn.jobs.command_line.configuration import plain
from bqnn.jobs.isolation import leave_as_found
from bqnn.jobs.job import Job
from bqnn.jobs.ranks import ALONE, Place, find_place
from bqnn.methods import METHODS
from bqnn.quant.callback import QuantizationCallback
from bqnn.quant.spec import QuantSpec
from bqnn.settings.conf import CONF
from bqnn.training.trainer import make_trainer

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("rank_worker.py")
worker: Any = runpy.run_path(str(WORKER))  # the same models, to be trained by one process here


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """Return the results of the two processes."""
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


@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        *(
            (name, quantized)
            for name in ("pointwise", "bbb", "sghmc")
            for quantized in (False, True)
        ),
        *(("swag", False), ("laplace", False)),
    ],
)
def test_two_ranks_train_what_one_process_would(
    name: str, quantized: bool, both: tuple[dict, dict]
) -> None:
    """Batches, KL, noise and ranges are equal; only the order of sums differs."""
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
    arguments += ["trainer.check_val_every_n_epoch=2"]
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
    with pytest.raises(ValueError, match=r"trainer\.devices=2: .* a single training"):
        make_trainer(job, [], [], validate=False)


SRUN = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "3"}
SRUN |= {"SLURM_LOCALID": "3", "SLURM_NODEID": "0", "SLURM_JOB_ID": "123", "SLURM_NNODES": "1"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}
TORCHRUN |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
JSRUN = {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "x", "JSM_NAMESPACE_LOCAL_RANK": "3"}
JSRUN |= {"JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_RANK": "3"}
PARENT = {"LOCAL_RANK": "3", "NODE_RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "1"}
LAUNCHED = {"srun": SRUN, "torchrun": TORCHRUN, "jsrun": JSRUN, "parent": PARENT}
STRAY = {
    "a rank": {"RANK": "3"},
    "a local rank": {"LOCAL_RANK": "1"},
    "nothing": {"RANK": "", "LOCAL_RANK": "", "SLURM_PROCID": "", "NODE_RANK": ""},
    "a word": {"RANK": "abc", "GROUP_RANK": "x", "WORLD_SIZE": "many"},
    "ntasks": {"SLURM_NTASKS": "4", "SLURM_PROCID": "2"},  # which Lightning refuses
}


def set_environment(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for key in {key for launched in LAUNCHED.values() for key in launched}:
        monkeypatch.delenv(key, raising=False)
    for key, value in values.items():
        monkeypatch.setenv(key, value)


@pytest.mark.parametrize("name", [*STRAY, *LAUNCHED])
def test_a_job_of_one_device_is_alone_whatever_the_environment_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, {**STRAY, **LAUNCHED}[name])
    for devices in (1, "1", [0], "2,"):
        for strategy in ("auto", "ddp"):
            assert find_place({"devices": devices, "strategy": strategy}) == ALONE
    assert find_place({}) == ALONE  # of evaluate.py


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_one_of_several_processes_knows_its_rank(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, LAUNCHED[launcher])
    for devices in (4, "4", [0, 1, 2, 3], "0,1,2,3", "auto", -1):
        assert find_place({"devices": devices}) == Place(3, launcher)
    with pytest.raises(ValueError, match=r"trainer\.devices=2: \w+=4 processes"):
        find_place({"devices": 2})
    monkeypatch.setenv("NODE_RANK", "1")
    rank = 5 if launcher == "parent" else 3  # others count over all nodes
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert find_place({"devices": 2, "num_nodes": 2}) == Place(rank, launcher)


@pytest.mark.parametrize("name", STRAY)
def test_a_trainer_of_several_devices_starts_its_own_processes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, STRAY[name])
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    assert find_place({"devices": 2}) == ALONE


def test_the_first_process_of_a_second_node_is_not_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_environment(monkeypatch, {"NODE_RANK": "1"})
    assert find_place({"devices": 2, "num_nodes": 2}) == Place(2, "parent")


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "parent", None])
def test_the_trainer_has_the_rank_of_its_job(
    launcher: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=4"]
        config = plain(compose("train", overrides if launcher else []))
    # Alone amid a foreign launcher, or one of four; Lightning was imported with rank 0 or another.
    set_environment(monkeypatch, LAUNCHED[launcher or "srun"])
    monkeypatch.setattr(rank_zero_only, "rank", 2)
    before = dict(os.environ)
    with Job(tmp_path, "train") as job:
        assert job.take(config, resume=False)
        leave_as_found(job)
        trainer = make_trainer(job, [], [], validate=False)
        assert (job.rank, trainer.global_rank) == ((3, 3) if launcher else (0, 0))
        assert rank_zero_only.rank == job.rank  # type: ignore[attr-defined]
    assert job.state == "DONE", job.status.error
    assert (tmp_path / "status.json").exists() == (launcher is None)
    changed = {"MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"}
    kept = before.keys() - (changed if launcher else set())
    assert {key: os.environ.get(key) for key in kept} == {key: before[key] for key in kept}


@pytest.mark.parametrize("name", STRAY)
def test_a_job_of_one_device_leaves_all_its_files(
    name: str,
    script_here: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_environment(monkeypatch, STRAY[name])
    arguments = ["task=synthetic", "method=pointwise", "trainer=smoke", "plots=false"]
    arguments += ["logger=csv", "hydra.run.dir=run"]
    code, errors = script_here("train", *arguments)
    assert code == 0, errors
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        *("checkpoint.ckpt", "config.yaml", "csv", "metrics.csv", "metrics.json"),
        *("predictions.npz", "status.json"),
    }
    assert (tmp_path / "run" / "csv" / "metrics.csv").exists()
    before = (tmp_path / "run" / "status.json").read_bytes()
    code, errors = script_here("train", *arguments)
    assert code == 1
    assert "already holds a job" in errors
    assert (tmp_path / "run" / "status.json").read_bytes() == before


def test_importing_lightning_survives_a_rank_that_is_none(
    script: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_environment(monkeypatch, STRAY["nothing"])
    arguments = ["task=synthetic", "method=pointwise", "trainer=smoke", "plots=false"]
    result = script("train", *arguments, "logger=none", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "metrics.json").exists()
