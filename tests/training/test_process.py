"""Setup of torch before a training."""

import ctypes
from pathlib import Path

import pytest
import torch

from bqnn.jobs.job import Job
from bqnn.training.process import prepare_torch


def test_optimizers_do_not_search_for_gpus_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as Lightning sets it
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.ones(2)
    job = Job(tmp_path, "train")
    job.configure({"trainer": {"threads": None, "accelerator": "auto"}})
    assert prepare_torch(job) == "cpu"
    searches: list[str] = []
    monkeypatch.setattr(ctypes.CDLL, "__init__", lambda self, name, *_: searches.append(name))
    optimizer.step()
    assert not searches
