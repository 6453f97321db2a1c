"""The data set of a job's task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bqnn.arguments import prefixed
from bqnn.data import DATASETS, TensorData, build_data
from bqnn.plugins import refuse_foreign
from bqnn.text import printable, short

# The keys of a task that configure training; all others are options of its data set.
TRAINING_KEYS = (
    *("name", "dataset", "_target_", "max_epochs", "check_val_every_n_epoch", "save_every"),
)


def make_data(config: Mapping[str, Any]) -> TensorData:
    """Download, read and split the data set of a job's task.

    If the task comes from a checkpoint, its folder must be below the working directory or
    `data_dir`, and its data set must be one of bqnn, unless `trust` is set: an untrusted checkpoint
    cannot choose the files that are read, or the code that is run.

    Args:
        config: The configuration of a job, with the keys `task`, `data_dir` and `seed`.

    Raises:
        FileNotFoundError: Files are missing and cannot be downloaded.
        ValueError: An option is invalid (the message names its key), data are damaged, or the
            folder or the class of the data set is not allowed.

    Example:
        >>> task = {"name": "toy", "dataset": "synthetic", "max_epochs": 3, "num_test": 10}
        >>> len(make_data({"task": task, "data_dir": "data", "seed": 0}).test)
        10
    """
    task = config["task"]
    if "checkpoint" in config and not config.get("trust"):
        refuse_foreign({"task": (task, DATASETS)}, printable(str(config["checkpoint"])))
        if task.get("root") is not None:
            _require_near(Path(task["root"]), [Path.cwd(), Path(config["data_dir"])])
    options = {key: value for key, value in task.items() if key not in TRAINING_KEYS}
    with prefixed("task"):
        data = build_data(
            task["dataset"],
            data_dir=config["data_dir"],
            seed=config["seed"],
            options=options,
            target=task.get("_target_"),
        )
        data.prepare_data()
        data.setup()
    return data


def _require_near(root: Path, folders: list[Path]) -> None:
    where = root.expanduser().resolve()
    if not any(where.is_relative_to(folder.expanduser().resolve()) for folder in folders):
        raise ValueError(
            f"the task of the checkpoint reads the folder {short(str(root), 200)}, which is "
            "neither below the working directory nor below data_dir; if you trust the checkpoint, "
            "add trust=true"
        )
