"""Set a process up for torch and Lightning: threads, memory, and warnings that are known."""

import ctypes
import logging
import os
import sys
import warnings

import torch

from bqnn.jobs.job import Job


def prepare_torch(job: Job) -> str:
    """Set threads, memory and warnings up for a job.

    Returns:
        The accelerator to run on, as Lightning names it.
    """
    options = job.config["trainer"]
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    silence_known_warnings()
    keep_freed_memory()
    stop_searching_for_gpus()
    return find_accelerator(options["accelerator"])


def find_accelerator(name: str) -> str:
    """The accelerator that `trainer.accelerator` stands for.

    Raises:
        ValueError: It is a GPU, and torch finds none.
    """
    if name == "cpu":
        return name
    if torch.cuda.is_available():
        return "cuda"
    if name == "auto":  # Lightning would take a device without float64
        return "cpu"
    raise ValueError(
        f"trainer.accelerator={name}: torch finds no GPU of NVIDIA or AMD on this machine; choose "
        "auto or cpu"
    )


def stop_searching_for_gpus() -> None:
    """Make torch's check for a GPU cheap on a machine without one.

    Optimizers ask for a GPU at every step. Lightning makes torch ask NVIDIA's library, for the sake
    of processes that fork, which bqnn's do not. Without a GPU the search for that library takes
    longer than a step of Adam on a small network.
    """
    if not torch.cuda.is_available():
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


def keep_freed_memory() -> None:
    """Make the C library reuse the memory of a step in the next one.

    By default glibc returns large blocks to the system and gets them back page by page, which
    took an eighth of a Bayes-by-backprop step on LeNet. The peak of memory stays the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)


def silence_known_warnings() -> None:
    """Silence deprecations that bqnn knowingly depends on, and advice that it does not need."""
    # Lightning's remarks on the hardware it found are in status.json already.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=r"It is recommended to use `self.log\(.*sync_dist=True"
    )  # every rank evaluates all rows, so that their metrics are equal
    warnings.filterwarnings(
        "ignore",
        message=r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6, torch 2.14
        category=FutureWarning,
    )
