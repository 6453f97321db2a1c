"""The verbs of the command line: train, quantize and evaluate.

The module of a verb has `check`, which validates a configuration before the job starts, and `run`,
which runs the job. These modules import torch, so `main` imports them after a first check of the
command line.
"""

from importlib import import_module
from typing import Any

from bqnn.jobs.job import Job
from bqnn.jobs.launch import launch


def main(verb: str) -> None:
    """Run a verb with the command line of this process and exit.

    Args:
        verb: train, quantize or evaluate.
    """

    def run(job: Job) -> None:
        import_module(f"bqnn.commands.{verb}").run(job)

    def check(config: dict[str, Any], is_sweep: bool) -> None:
        import_module(f"bqnn.commands.{verb}").check(config, is_sweep)

    launch(run, verb, check)
