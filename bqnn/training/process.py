"""Set a process up for torch and Lightning: threads, memory, and warnings that are known."""

import ctypes
import os
import sys
import warnings

import torch

from bqnn.jobs.job import Job


def prepare_torch(job: Job) -> str:
    """Set threads and memory up as a job wants them, and name the accelerator that it runs on."""
    options = job.config["trainer"]
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    silence_known_warnings()
    keep_freed_memory()
    stop_searching_for_gpus()
    accelerator: str = options["accelerator"]
    if accelerator == "auto":  # Lightning would take a device without float64
        return "cuda" if torch.cuda.is_available() else "cpu"
    return accelerator


def stop_searching_for_gpus() -> None:
    """Where there is no GPU, have torch's optimizers take that as known.

    They ask at every step. Lightning sets how: by loading NVIDIA's library, which is searched for
    in vain for longer than Adam takes on a small network. That is for processes that fork, and
    ours do not.
    """
    if not torch.cuda.is_available():
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


def keep_freed_memory() -> None:
    """Have the C library reuse the memory of a step in the next one.

    By default glibc returns large blocks to the system and gets them back page by page, which
    took an eighth of a Bayes-by-backprop step on LeNet. It costs nothing over the peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)


def silence_known_warnings() -> None:
    """The upstream deprecations that we knowingly depend on, and advice that we do not need."""
    warnings.filterwarnings(
        "ignore", message=r"It is recommended to use `self.log\(.*sync_dist=True"
    )  # every rank evaluates all rows, so that their metrics are equal
    warnings.filterwarnings(
        "ignore",
        message=r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6, torch 2.14
        category=FutureWarning,
    )
    warnings.filterwarnings(
        "ignore",
        message=r"torch.quantize_per_tensor, torch.quantize_per_channel and other quantized tensor "
        r"creation functions that produce tensors with dtype torch.quint8, torch.qint8, and "
        r"torch.qint32 are deprecated",  # torch 2.14; bqnn/quant/fbgemm.py says what it would take
        category=UserWarning,
    )
