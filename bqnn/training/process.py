"""Set up torch and Lightning in a process: threads, memory, accelerator and warnings."""

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning.accelerators import CUDAAccelerator

from bqnn.jobs.job import Job


def prepare_torch(job: Job) -> str:
    """Set up threads, memory and warnings for a job, and find its accelerator.

    Args:
        job: The job. The group `trainer` of its configuration has `threads` and `accelerator`.

    Returns:
        The accelerator, `cpu` or `cuda`.

    Raises:
        ValueError: The accelerator is a GPU, and torch finds none.
    """
    options = job.config["trainer"]
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    if options.get("matmul_precision") is not None:
        before = torch.get_float32_matmul_precision()
        job.at_end(lambda _: torch.set_float32_matmul_precision(before))
        torch.set_float32_matmul_precision(options["matmul_precision"])
    flush_denormals(job)
    silence_known_warnings()
    keep_freed_memory()
    stop_searching_for_gpus()
    return find_accelerator(options["accelerator"])


def flush_denormals(job: Job) -> None:
    """Let the CPU replace results below 1.2e-38 by zero until the job ends.

    Arithmetic with such denormal numbers takes many times as long. On MNIST, whose pixels are
    mostly black, they made up two fifths of the time of a training of `bbb`.

    Args:
        job: The job, which restores the state that it finds.
    """
    tiny = torch.finfo(torch.float32).tiny
    if torch.tensor(tiny).div(2).item() > 0 and torch.set_flush_denormal(True):

        def restore(_: int) -> None:
            torch.set_flush_denormal(False)

        job.at_end(restore)


def find_accelerator(name: str) -> str:
    """Return the accelerator for a value of `trainer.accelerator`.

    Args:
        name: `cpu`, `gpu`, `cuda`, or `auto`: a GPU of NVIDIA or AMD if torch finds one, and
            otherwise the CPU.

    Returns:
        `cpu` or `cuda`.

    Raises:
        ValueError: The name is `gpu` or `cuda`, and torch finds no GPU.

    Examples:
        >>> find_accelerator("cpu")
        'cpu'
    """
    if name == "cpu":
        return name
    if torch.cuda.is_available():
        return "cuda"
    if name == "auto":  # Lightning's "auto" can choose a device without float64
        return "cpu"
    raise ValueError(
        f"trainer.accelerator={name}: torch finds no GPU of NVIDIA or AMD on this machine; choose "
        "auto or cpu"
    )


def find_device(options: Mapping[str, Any]) -> torch.device:
    """Return the device on which a job evaluates networks, the first of those that it may use.

    Args:
        options: The group `trainer` of a configuration.

    Examples:
        >>> find_device({"accelerator": "cpu", "devices": 1})
        device(type='cpu')
    """
    if find_accelerator(options["accelerator"]) == "cpu":
        return torch.device("cpu")
    devices = options.get("devices", "auto")
    chosen = [0] if devices == "auto" else CUDAAccelerator.parse_devices(devices)
    return torch.device("cuda", chosen[0] if chosen else 0)


def stop_searching_for_gpus() -> None:
    """Make torch's check for a GPU fast on machines without a GPU.

    Optimizers check for a GPU in every step. Lightning makes torch use NVIDIA's library (NVML) for
    the check, which is only needed by processes that fork. bqnn does not fork. Without a GPU, the
    search for this library takes longer than a step of Adam on a small network.
    """
    if not torch.cuda.is_available():
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of a training step in the next step.

    By default, glibc returns large blocks to the system and gets them back page by page. This took
    an eighth of the time of a Bayes-by-backprop step on LeNet. The peak memory is the same. The
    function has an effect on Linux only.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)


def silence_known_warnings() -> None:
    """Silence warnings of Lightning and torch that do not apply to bqnn."""
    # Lightning logs the hardware that it finds, which is also in status.json.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=r"It is recommended to use `self.log\(.*sync_dist=True"
    )  # every rank evaluates all rows, so the metrics of all ranks are equal
    warnings.filterwarnings(
        "ignore",
        message=r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6, torch 2.14
        category=FutureWarning,
    )
