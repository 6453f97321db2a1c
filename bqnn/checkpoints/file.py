"""Checkpoint files: found, and opened without trusting them."""

import logging
from collections.abc import Iterable
from math import isinf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bqnn.checkpoints.archive import check_archive
from bqnn.checkpoints.schema import check_recipe
from bqnn.files import open_regular
from bqnn.jobs.locate import is_pattern, locate_all
from bqnn.jobs.records import read_record
from bqnn.jobs.status import read_status
from bqnn.settings.rules import is_finite
from bqnn.text import printable, short

log = logging.getLogger(__name__)


def find_checkpoints(
    pattern: str, stage: str | None = None, select: str = "all"
) -> dict[Path, dict[str, Any] | None]:
    """The recipes of the checkpoints at a path or pattern, as `locate_all` finds them.

    One of a pattern's matches that cannot be read has None: the others are not to wait for it.

    stage: `float` or `quantized`, or None for both; a pattern's other matches are left out.
    select: `all`, or `best`, the one with the lowest val/nll in the metrics.json beside it, for
    each method and task. What comes from a run that is not done is left out of a pattern's matches,
    too. FileNotFoundError: there is none. ValueError: the one at a path cannot be read, none has
    that stage, or no run is done.
    """
    if select not in ("all", "best"):
        raise ValueError(f"select={select}: choose all or best")
    paths, are_many = locate_all("checkpoint", pattern), is_pattern(pattern)
    if are_many:
        paths = _of_finished_runs(pattern, paths)
        log.info("%d checkpoints match", len(paths))
    found: dict[Path, dict[str, Any] | None] = {}
    for path in paths:
        try:
            recipe = read_checkpoint(path)["recipe"]
        except (OSError, ValueError):
            if not are_many:
                raise
            found[path] = None
        else:
            if stage in (None, _stage(recipe)):
                found[path] = recipe
    if not found and stage == "float":
        raise ValueError(
            f"checkpoint={pattern}: quantized already; rounding it again would round what is left. "
            "Start from the float checkpoint it was made of"
        )
    if not found:
        raise ValueError(
            f"checkpoint={pattern}: not quantized, so there is no other numeric than float; leave "
            f"numeric out, or quantize it first (python quantize.py checkpoint={pattern})"
        )
    if len(found) < len(paths):
        log.info("left out: %d checkpoints that are not %s", len(paths) - len(found), stage)
    return found if select == "all" else _best_of_each(found)


def _best_of_each(found: dict[Path, dict[str, Any] | None]) -> dict[Path, dict[str, Any] | None]:
    """The best of each method and task, and what cannot be read, so that it is not dropped."""
    candidates: dict[tuple[str, str], dict[Path, float]] = {}
    for path, recipe in found.items():
        if recipe is not None:
            key = (recipe["method"]["name"], recipe["task"]["name"])
            candidates.setdefault(key, {})[path] = _validation_nll(path)
    for (method, task), nll in candidates.items():
        if len(nll) > 1 and isinf(min(nll.values())):
            raise ValueError(
                f"select=best: no run of {method} on {task} has a val/nll to choose by; train with "
                "task.validation_share above 0, or take select=all"
            )
    chosen = {min(nll, key=nll.__getitem__) for nll in candidates.values()}
    return {path: r for path, r in found.items() if r is None or path in chosen}


def _stage(recipe: dict[str, Any]) -> str:
    return "float" if recipe["stage"] == "float" else "quantized"


def _of_finished_runs(pattern: str, paths: list[Path]) -> list[Path]:
    """Those beside which no status.json says that the training is not done."""
    finished = [
        path for path in paths if (read_status(path.parent) or {"state": "DONE"})["state"] == "DONE"
    ]
    if not finished:
        raise ValueError(
            f"checkpoint={pattern}: none of these {len(paths)} runs is done; go on with them first "
            "(resume=true), or give one checkpoint by its path"
        )
    if len(finished) < len(paths):
        log.info("left out: %d checkpoints of runs not done", len(paths) - len(finished))
    return finished


def _validation_nll(path: Path) -> float:
    """The val/nll beside a checkpoint; infinity where there is none to compare."""
    try:
        nll = read_record(path.parent / "metrics.json").get("val/nll")
    except (OSError, ValueError):
        nll = None
    if is_finite(nll):
        return float(nll)  # type: ignore[arg-type]
    log.warning(
        "%s has no val/nll in a metrics.json beside it: counted as the worst", printable(str(path))
    )
    return float("inf")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU, its recipe checked against the schema.

    Opening it runs no code from the file and takes time and memory in proportion to its length.
    FileNotFoundError, ValueError: there is none, or it is cut, altered or of another origin.
    """
    where = printable(str(path))
    try:
        with open_regular(path) as file:
            check_archive(file)
            file.seek(0)
            # The file that was checked, though another may have its name by now.
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        why = ": it is a link to what is not there" if Path(path).is_symlink() else ""
        raise FileNotFoundError(
            f"no checkpoint at {where}{why}; give the path of a .ckpt file"
        ) from None
    except Exception as error:  # what a foreign or cut file raises is anybody's guess
        reason = printable(str(error).partition("\n")[0])
        raise ValueError(f"{where} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or not {"recipe", "state_dict"} <= checkpoint.keys():
        raise ValueError(f"{where} holds no recipe and state_dict: it is not a checkpoint of bqnn")
    try:
        check_recipe(checkpoint["recipe"])
        _check_state(checkpoint["state_dict"])
    except ValueError as error:
        raise ValueError(f"{where} is refused: {error}") from error
    return checkpoint


def trained_epochs(path: Path) -> int:
    """How many epochs the training in a checkpoint has done.

    ValueError: it is no checkpoint, or none of a training that can go on.
    """
    checkpoint, where = read_checkpoint(path), printable(str(path))
    for key, kind in RESUMED.items():
        if type(checkpoint.get(key)) is not kind:
            raise ValueError(f"{where} has no {key} of a training to go on with; start a new one")
    epoch: int = checkpoint["epoch"]
    if not 0 <= epoch < 2**31:
        raise ValueError(f"{where} says that it is of epoch {short(epoch)}; start a new training")
    return epoch + 1


# What Lightning goes on from, beside the weights.
RESUMED = {
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "pytorch-lightning_version": str,
}


def _check_state(state: object) -> None:
    """ValueError for a state of anything but tensors, and what torch says of its modules."""
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and name.isprintable() and isinstance(value, Tensor)
        for name, value in state.items()
    ):
        raise ValueError("its state_dict holds other things than named, dense tensors")
    for entry in _versions(state):
        if not isinstance(entry, dict) or any(
            key != "version" or not (value is None or type(value) is int)
            for key, value in entry.items()
        ):
            raise ValueError("its state_dict says other things of its modules than versions")


def _versions(state: object) -> Iterable[object]:
    """What a state says of each of its modules, which torch looks at when it is loaded."""
    metadata = getattr(state, "_metadata", {})
    return metadata.values() if isinstance(metadata, dict) else [metadata]
