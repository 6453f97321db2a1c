"""The data set of a job's task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bqnn.arguments import prefixed
from bqnn.data import DATASETS, TensorData, build_data
from bqnn.plugins import refuse_foreign
from bqnn.settings.options import is_plugin
from bqnn.text import printable, short

# The keys of a task that configure training; all others are options of its data set.
TRAINING_KEYS = (
    *(
        "name",
        "dataset",
        "_target_",
        "max_epochs",
        "check_val_every_n_epoch",
        "save_every",
        "refit",
    ),
)

# The facts of data that are the same in every job with one checkpoint.
IDENTITY = (
    *("source_sha256", "likelihood", "input_shape", "class_names"),
    *("feature_names", "feature_categories", "target_name"),
)


def make_data(config: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> TensorData:
    """Download, read and split the data set of a job's task.

    If the task comes from a checkpoint, its file or folder must be below the working directory or
    `data_dir`, and its data set must be one of bqnn, unless `trust` is set: an untrusted checkpoint
    cannot choose the files that are read, or the code that is run.

    Args:
        config: The configuration of a job, with the keys `task`, `data_dir` and `seed`.
        recipe: The recipe of the checkpoint, or None if there is none. The data must be those of
            its training.

    Raises:
        FileNotFoundError: Files are missing and cannot be downloaded.
        ValueError: An option is invalid (the message names its key), data are damaged or have
            changed since the training, or the file, the folder or the class of the data set is not
            allowed.

    Examples:
        >>> task = {"name": "toy", "dataset": "synthetic", "max_epochs": 3, "num_test": 10}
        >>> len(make_data({"task": task, "data_dir": "data", "seed": 0}).test)
        10
    """
    task = config["task"]
    if "checkpoint" in config and not config.get("trust"):
        refuse_foreign({"task": (task, DATASETS)}, printable(str(config["checkpoint"])))
        for key in ("root", "file"):
            if task.get(key) is not None:
                _require_near(Path(task[key]), [Path.cwd(), Path(config["data_dir"])])
    with prefixed("task"):
        data = _built(config)
        data.prepare_data()
        data.setup()
    if recipe is not None:
        _require_same(data.facts(), recipe["facts"], task["name"])
    return data


def check_data(config: Mapping[str, Any]) -> None:
    """Refuse the options of a job's task that do not fit its file or folder, without reading it.

    A data set of another package is only checked when it is read.

    Args:
        config: The configuration of a job, with the keys `task`, `data_dir` and `seed`.

    Raises:
        FileNotFoundError: The file or the folder does not exist.
        ValueError: An option is invalid, or the file has no such columns.

    Examples:
        >>> task = {"name": "mine", "dataset": "table", "file": "a.csv", "target": "price"}
        >>> check_data({"task": task, "data_dir": "data", "seed": 0})
        Traceback (most recent call last):
        FileNotFoundError: no file a.csv: give the path of a CSV file, from the working directory
    """
    if not is_plugin("task", config["task"]):
        with prefixed("task"):
            _built(config).check_source()


def _built(config: Mapping[str, Any]) -> TensorData:
    task = config["task"]
    options = {key: value for key, value in task.items() if key not in TRAINING_KEYS}
    if task.get("refit"):
        options["validation_share"] = 0
    return build_data(
        task["dataset"],
        data_dir=config["data_dir"],
        seed=config["seed"],
        options=options,
        target=task.get("_target_"),
    )


def _require_same(facts: Mapping[str, Any], before: Mapping[str, Any], name: str) -> None:
    """Refuse other data than those of the training: its test rows could be training rows."""
    for key in IDENTITY:
        if key in facts and key in before and facts[key] != before[key]:
            raise ValueError(
                f"the data of task {short(name)} have changed since the training of the checkpoint "
                f"({key} differs); restore them, or train again"
            )


def _require_near(root: Path, folders: list[Path]) -> None:
    where = root.expanduser().resolve()
    if not any(where.is_relative_to(folder.expanduser().resolve()) for folder in folders):
        raise ValueError(
            f"the task of the checkpoint reads {short(str(root), 200)}, which is neither "
            "below the working directory nor below data_dir; if you trust the checkpoint, "
            "add trust=true (which also lets the checkpoint name code to import)"
        )
