"""Jobs in one process do not affect each other."""

import logging
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bqnn.jobs.isolation import leave_as_found
from bqnn.jobs.job import Job

ScriptHere = Callable[..., tuple[int, str]]


def process_state() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "engine": torch.backends.quantized.engine,
        "random": torch.get_rng_state().tolist(),
        "filters": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "level": logging.getLogger("pytorch_lightning").level,
    }


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def test_process_wide_state_is_restored_after_a_job(tmp_path: Path) -> None:
    before = process_state()
    other = next(e for e in torch.backends.quantized.supported_engines if e != before["engine"])
    with Job(tmp_path, "train") as job:
        leave_as_found(job)
        torch.set_num_threads(before["threads"] + 1)
        torch.set_default_dtype(torch.float64)
        torch.backends.quantized.engine = other
        torch.manual_seed(12345)
        warnings.filterwarnings("ignore", message="something")
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        raise ValueError("failed")
    assert process_state() == before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_fifty_jobs_in_one_process_leave_it_as_it_was(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = ["-m", "task=synthetic", "trainer=smoke", "trainer.threads=1", "logger=none"]
    arguments += ["plots=false", "method=pointwise,sghmc", "quant=none,default"]

    def run(seeds: str) -> None:
        code, errors = script_here("train", *arguments, f"seed=range({seeds})")
        assert code == 0, errors

    run("0,2")  # what is loaded and cached once
    before, memory = process_state(), resident_mib()
    run("2,14")
    assert resident_mib() - memory < 20
    after = process_state()
    assert after == before
    import wandb

    assert wandb.run is None


def test_remarks_of_lightning_on_the_hardware_take_no_line_of_a_run(
    script_here: ScriptHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_lightning.accelerators import CPUAccelerator

    def remark(*_: object) -> None:
        for name in ("accelerators.cuda", "utilities.rank_zero"):
            logging.getLogger(f"pytorch_lightning.{name}").info("LOCAL_RANK: 0 - a remark")

    monkeypatch.setattr(CPUAccelerator, "setup", remark)
    arguments = ["method=pointwise", "task=synthetic", "trainer=smoke", "plots=false"]
    code, errors = script_here("train", *arguments, "logger=none", "hydra.run.dir=run")
    assert code == 0, errors
    assert "LOCAL_RANK" not in errors
    assert "LOCAL_RANK" not in (tmp_path / "run" / "train.log").read_text()
