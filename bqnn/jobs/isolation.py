"""Restore process-wide state when a job ends."""

import gc
import logging
import warnings
from contextlib import ExitStack

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
    undo = ExitStack()  # closed in reverse order
    undo.callback(gc.collect)  # a Trainer and its model reference each other
    for name in CHANGED_LOGGERS:
        logger = logging.getLogger(name)
        undo.callback(logger.setLevel, logger.level)
    engines, rank = torch.backends.quantized, rank_zero_only.rank  # type: ignore[attr-defined]
    undo.callback(setattr, rank_zero_only, "rank", rank)
    undo.callback(torch.set_rng_state, torch.get_rng_state())
    undo.callback(setattr, engines, "engine", engines.engine)
    undo.callback(torch.set_default_dtype, torch.get_default_dtype())
    undo.callback(torch.set_num_threads, torch.get_num_threads())
    undo.enter_context(warnings.catch_warnings())
    # Lightning read the rank from the environment at import.
    rank_zero_only.rank = job.rank  # type: ignore[attr-defined]
    job.at_end(lambda _: undo.close())
