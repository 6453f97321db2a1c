"""Restore process-wide state when a job ends."""

import gc
import logging
import warnings

import torch
from pytorch_lightning.utilities import rank_zero_only

from bqnn.jobs.job import Job

CHANGED_LOGGERS = ("pytorch_lightning",)


def leave_as_found(job: Job) -> None:
    """Restore process-wide state and free memory when a Job ends.

    The state is the warning filters, torch's threads, default type, quantization engine and random
    state, the rank of Lightning's logging, and the levels of `CHANGED_LOGGERS`.

    Args:
        job: The Job. The state is saved now and restored at its end.
    """
    kept_filters = warnings.catch_warnings()
    kept_filters.__enter__()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    engine, random_state = torch.backends.quantized.engine, torch.get_rng_state()
    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    # Lightning read the rank from the environment at import.
    rank_zero_only.rank = job.rank  # type: ignore[attr-defined]
    levels = {name: logging.getLogger(name).level for name in CHANGED_LOGGERS}

    def restore(exit_code: int) -> None:
        kept_filters.__exit__(None, None, None)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.backends.quantized.engine = engine
        torch.set_rng_state(random_state)
        rank_zero_only.rank = rank  # type: ignore[attr-defined]
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        gc.collect()  # a Trainer and its model reference each other

    job.at_end(restore)
