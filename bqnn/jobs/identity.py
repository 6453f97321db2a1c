"""Recognize a Run by what its results depend on: its configuration and its input checkpoint."""

import functools
import hashlib
import json
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

from bqnn.jobs.records import read_record

# Keys that do not affect results: Runs that differ only in these keys are the same Run.
WITHOUT_EFFECT = (
    *("resume", "trust", "logger", "data_dir"),
    *("trainer.threads", "trainer.progress_bar", "trainer.data_on_device"),
)
# Keys that older Runs lack. With these values they have no effect, and are left out of the hash.
NEWER: dict[str, Any] = {
    "trainer.compile": False,
    "trainer.matmul_precision": None,
    "objective": [],
    "task.refit": False,
    "quant.weight_rounding": "nearest",
    "quant.bias_correction": False,
    **{"max_samples": None, "tolerance": None, "predictive": "draws"},
    "quant.budget": {
        **dict.fromkeys(("mean_bits", "bytes", "mean_activation_bits", "other")),
        **{"measure": "nll", "widths": [2, 3, 4, 5, 6, 7, 8], "rows": 2000},
    },
}
LENGTH = ("trainer.max_epochs", "task.max_epochs")  # a training can be resumed with more epochs


def config_hash(config: dict[str, Any], without: Iterable[str] = WITHOUT_EFFECT) -> str:
    """Hash a resolved configuration. Equal hashes mean equal results.

    If the Job starts from a checkpoint, the hash includes the SHA-256 of the checkpoint, since a
    retrained checkpoint gives other results. Compare hashes with `is_same`.

    Args:
        config: The resolved configuration.
        without: Dotted keys to ignore.

    Returns:
        16 hexadecimal digits; with a checkpoint, a dash and the first 16 digits of its SHA-256
        follow.

    Examples:
        >>> config_hash({"seed": 0, "resume": True}) == config_hash({"seed": 0})
        True
    """
    kept = deepcopy(config)
    for key in without:
        node, last = _node(kept, key)
        node.pop(last, None)
    for key, value in NEWER.items():
        node, last = _node(kept, key)
        if last in node and node[last] == value:
            del node[last]
    key = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
    digest = input_digest(config)
    return key if digest is None else f"{key}-{digest[:16]}"


def input_digest(config: dict[str, Any]) -> str | None:
    """Return the SHA-256 of the checkpoint that a Job starts from.

    Args:
        config: The resolved configuration.

    Returns:
        The hexadecimal digest. None if the Job starts from no checkpoint, if the checkpoint no
        longer exists, or for a pattern, since each of its matches is the input of its own Job.
    """
    node, last = _node(config, "checkpoint" if "checkpoint" in config else "method.init_from")
    named = node.get(last)
    if not isinstance(named, str):
        return None
    try:
        path = Path(named)
        path = path / "checkpoint.ckpt" if path.is_dir() else path
        found = path.stat()
        if not path.is_file():  # opening a FIFO would block
            return None
        return _digest(path.absolute(), found.st_mtime_ns, found.st_size, found.st_ino)
    except (OSError, ValueError):  # an invalid path is refused when it is opened
        return None


def is_same(recorded: str | None, config_hash: str) -> bool:
    """Return whether two hashes of `config_hash` describe the same Run.

    Args:
        recorded: The recorded hash, or None if there is none.
        config_hash: The current hash. If it lacks the part of the checkpoint, because the
            checkpoint no longer exists, that part of `recorded` is ignored.

    Examples:
        >>> is_same("0123456789abcdef-fedcba9876543210", "0123456789abcdef")
        True
    """
    return recorded == config_hash or (
        recorded is not None and recorded.partition("-")[0] == config_hash
    )


def is_prolonged(folder: Path, config: dict[str, Any]) -> bool:
    """Return whether a folder holds a Run of this configuration with fewer epochs.

    Args:
        folder: The folder of the Run.
        config: The resolved configuration of the training.
    """
    try:
        before = read_record(folder / "config.yaml")
        shorter = before["trainer"]["max_epochs"] < config["trainer"]["max_epochs"]
        keys = (*WITHOUT_EFFECT, *LENGTH)
        return shorter and config_hash(before, keys) == config_hash(config, keys)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # not a training, or a file with other content


def _node(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the group of a dotted key, or an empty group if it is missing, and the last part."""
    *groups, last = key.split(".")
    for group in groups:
        found = config.get(group)
        config = found if isinstance(found, dict) else {}
    return config, last


@functools.cache
def _digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
