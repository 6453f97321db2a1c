"""Find checkpoint files, and read them without trusting them."""

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
from bqnn.jobs.typed import command_line
from bqnn.settings.rules import is_finite
from bqnn.text import printable, short

log = logging.getLogger(__name__)


def find_checkpoints(
    pattern: str, stage: str | None = None, select: str = "all"
) -> dict[Path, dict[str, Any] | None]:
    """Find checkpoints by path or glob pattern, and read their recipes.

    Of a pattern's matches, checkpoints of runs that are not DONE and of another stage are left out.

    Args:
        pattern: A path or a glob pattern.
        stage: `float`, `quantized`, or None for both.
        select: `all`, or `best` for the checkpoint of each method and task with the lowest val/nll
            in the metrics.json beside it.

    Returns:
        The recipe of each checkpoint. It is None for a match of a pattern that cannot be read, so
        that one such file does not stop the others.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The file at a path cannot be read, or no checkpoint is left.
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
            f"checkpoint={pattern}: already quantized, and cannot be quantized again; give the "
            "float checkpoint that it was made from"
        )
    if not found:
        raise ValueError(
            f"checkpoint={pattern}: not quantized, so float is its only numeric; quantize the "
            f"checkpoint first ({command_line('quantize')} checkpoint={pattern}), or evaluate it "
            "without numeric"
        )
    if len(found) < len(paths):
        log.info("skipped %d checkpoints that are not %s", len(paths) - len(found), stage)
    return found if select == "all" else _best_of_each(found)


def _best_of_each(found: dict[Path, dict[str, Any] | None]) -> dict[Path, dict[str, Any] | None]:
    """Select the best checkpoint of each method and task, and keep unreadable ones."""
    candidates: dict[tuple[str, str], dict[Path, float]] = {}
    for path, recipe in found.items():
        if recipe is not None:
            key = (recipe["method"]["name"], recipe["task"]["name"])
            candidates.setdefault(key, {})[path] = _validation_nll(path)
    for (method, task), nll in candidates.items():
        if len(nll) > 1 and isinf(min(nll.values())):
            raise ValueError(
                f"select=best: no run of {method} on {task} has a val/nll to choose by; train with "
                "task.validation_share above 0 and task.refit=false, or use select=all"
            )
    chosen = {min(nll, key=nll.__getitem__) for nll in candidates.values()}
    return {path: r for path, r in found.items() if r is None or path in chosen}


def _stage(recipe: dict[str, Any]) -> str:
    return "float" if recipe["stage"] == "float" else "quantized"


def _of_finished_runs(pattern: str, paths: list[Path]) -> list[Path]:
    """Drop checkpoints with a status.json beside them that is not DONE."""
    statuses = {path: read_status(path.parent) for path in paths}
    finished = [
        path for path, status in statuses.items() if status is None or status.state == "DONE"
    ]
    if not finished:
        raise ValueError(
            f"checkpoint={pattern}: none of these {len(paths)} runs is done; resume them first "
            "(resume=true), or give the path of one checkpoint"
        )
    if len(finished) < len(paths):
        log.info("skipped %d checkpoints of runs that are not done", len(paths) - len(finished))
    return finished


def _validation_nll(path: Path) -> float:
    """Return val/nll from the metrics.json beside a checkpoint, or infinity without one."""
    try:
        nll = read_record(path.parent / "metrics.json").get("val/nll")
    except (OSError, ValueError):
        nll = None
    if is_finite(nll):
        return float(nll)  # type: ignore[arg-type]
    log.warning(
        "%s has no val/nll in a metrics.json beside it, and ranks last", printable(str(path))
    )
    return float("inf")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file, which may come from an untrusted source.

    Reading runs no code from the file, and takes time and memory in proportion to its length. The
    recipe is checked against the schema.

    Args:
        path: The path of the file.

    Returns:
        The content: `recipe`, `state_dict` (tensors on the CPU), and the state of the training if
        it can be resumed.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, modified, or not a checkpoint of bqnn.

    Examples:
        >>> import tempfile
        >>> recipe = {
        ...     "version": 1, "stage": "float", "seed": 0, "net": {"name": "mlp"},
        ...     "method": {"name": "pointwise", "optimizer": {"name": "adam"}},
        ...     "task": {"name": "table", "dataset": "uci"},
        ...     "facts": {"likelihood": "regression", "input_shape": [3], "num_train": 100},
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.ckpt")
        ...     torch.save({"recipe": recipe, "state_dict": {"weight": torch.zeros(2)}}, path)
        ...     read_checkpoint(path)["state_dict"]
        {'weight': tensor([0., 0.])}
    """
    where = printable(str(path))
    try:
        with open_regular(path) as file:
            check_archive(file)
            file.seek(0)
            # Load from the open file: the path could now refer to another one.
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        why = ": it is a broken link" if Path(path).is_symlink() else ""
        raise FileNotFoundError(
            f"no checkpoint at {where}{why}; give the path of a .ckpt file"
        ) from None
    except Exception as error:  # an invalid file can raise anything
        reason = printable(str(error).partition("\n")[0])
        raise ValueError(f"{where} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or not {"recipe", "state_dict"} <= checkpoint.keys():
        raise ValueError(f"{where} has no recipe and state_dict: it is not a checkpoint of bqnn")
    try:
        check_recipe(checkpoint["recipe"])
        _check_state(checkpoint["state_dict"])
    except ValueError as error:
        raise ValueError(f"{where} is refused: {error}") from error
    return checkpoint


def trained_epochs(path: Path) -> int:
    """Return the number of epochs that the training in a checkpoint has completed.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a checkpoint, or not one that a training can resume from.
    """
    checkpoint, where = read_checkpoint(path), printable(str(path))
    for key, kind in RESUMED.items():
        if type(checkpoint.get(key)) is not kind:
            raise ValueError(f"{where} has no {key} of a training to resume; start a new training")
    epoch: int = checkpoint["epoch"]
    if not 0 <= epoch < 2**31:
        raise ValueError(
            f"{where} is of epoch {short(epoch)}, which is invalid; start a new training"
        )
    return epoch + 1


# What Lightning needs to resume a training, besides the weights.
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
    """Refuse a state_dict with anything but tensors and the versions of modules."""
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and name.isprintable() and isinstance(value, Tensor)
        for name, value in state.items()
    ):
        raise ValueError("its state_dict has entries that are not named, dense tensors")
    for entry in _module_metadata(state):
        if not isinstance(entry, dict) or any(
            key != "version" or not (value is None or type(value) is int)
            for key, value in entry.items()
        ):
            raise ValueError("its state_dict has metadata of modules that are not versions")


def _module_metadata(state: object) -> Iterable[object]:
    """Return the metadata of each module, which torch reads in `load_state_dict`."""
    metadata = getattr(state, "_metadata", {})
    return metadata.values() if isinstance(metadata, dict) else [metadata]
