"""The verbs of the command line that run jobs: train, quantize, evaluate and export.

The module of a verb has `check`, which validates a configuration before the job starts, and `run`,
which runs the job. These modules import torch, so `main` imports them after a first check of the
command line.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from bqnn.jobs.job import Job
from bqnn.jobs.launch import launch


def main(verb: str, arguments: Sequence[str] | None = None) -> None:
    """Run a verb and exit.

    Args:
        verb: train, quantize, evaluate or export.
        arguments: The arguments of the verb; None for all arguments of this process.
    """
    typed = sys.argv
    own = typed if arguments is None else [typed[0], *arguments]

    def run(job: Job) -> None:
        with _command_line(typed):  # Lightning repeats it to start further processes
            import_module(f"bqnn.commands.{verb}").run(job)

    def check(config: dict[str, Any], is_sweep: bool) -> None:
        import_module(f"bqnn.commands.{verb}").check(config, is_sweep)

    with _command_line(own):  # Hydra reads its arguments there
        launch(run, verb, check)


@contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before
