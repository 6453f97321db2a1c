"""Setup of torch before a training."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bqnn.jobs.job import Job
from bqnn.training.process import prepare_torch


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path, "train")
    job.configure({"trainer": {"threads": None, "accelerator": "cpu"}})
    yield job
    for action in reversed(job.actions):
        action(0)


def test_optimizers_do_not_search_for_gpus_where_there_are_none(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as Lightning sets it
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.ones(2)
    job.config["trainer"]["accelerator"] = "auto"
    assert prepare_torch(job) == "cpu"
    searches: list[str] = []
    monkeypatch.setattr(ctypes.CDLL, "__init__", lambda self, name, *_: searches.append(name))
    optimizer.step()
    assert not searches


def test_denormal_numbers_are_zero_until_the_job_ends(job: Job) -> None:
    half = torch.tensor([1e-30, 1e-39]).mul(0.5)
    assert (half > 0).tolist() == [True, True]
    prepare_torch(job)
    half = torch.tensor([1e-30, 1e-39]).mul(0.5)
    assert (half > 0).tolist() == [True, False]
    job.actions.pop()(0)
    assert (torch.tensor([1e-39]).mul(0.5) > 0).all()
