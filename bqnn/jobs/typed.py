"""The command that the user typed, for messages that name a command."""

import shlex
import shutil
import sys
from pathlib import Path

SCRIPTS = ("train.py", "quantize.py", "evaluate.py")


def command(verb: str) -> list[str]:
    """Return the words that run a verb, in the form in which the user started this process.

    Args:
        verb: The name of the program, such as "train".

    Returns:
        `python train.py`, `python -m bqnn train` or `bqnn train`. The last one is also the form for
        processes that were started otherwise, such as a notebook.

    Examples:
        >>> command("train")
        ['bqnn', 'train']
    """
    started = Path(sys.argv[0])
    if started.name in SCRIPTS:
        return ["python", str(started.with_name(f"{verb}.py"))]
    if started.parts[-2:] == ("bqnn", "__main__.py"):
        return ["python", "-m", "bqnn", verb]
    if started.stem == "bqnn" and shutil.which("bqnn") != sys.argv[0]:
        return [sys.argv[0], verb]  # a path that the user typed
    return ["bqnn", verb]


def command_line(verb: str) -> str:
    """Return `command` as one string."""
    return shlex.join(command(verb))


def program(verb: str) -> str:
    """Return the name of a program in front of its messages: `train.py` or `bqnn train`."""
    return f"{verb}.py" if Path(sys.argv[0]).name in SCRIPTS else f"bqnn {verb}"
