"""The data set of a job's task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bqnn.arguments import prefixed
from bqnn.data import TensorData, build_data
from bqnn.text import short

# What a task says of training; all else in it is an option of its data set.
TRAINING_KEYS = ("name", "dataset", "max_epochs", "check_val_every_n_epoch", "save_every")


def make_data(config: Mapping[str, Any]) -> TensorData:
    """Download, read and split the data set of a job's task.

    Where the task came out of a checkpoint, a folder that it names has to be below the working
    directory or data_dir, unless `trust` says otherwise: a stranger's checkpoint does not choose
    what is read here.
    """
    task = config["task"]
    if "checkpoint" in config and task.get("root") is not None and not config.get("trust"):
        _require_near(Path(task["root"]), [Path.cwd(), Path(config["data_dir"])])
    options = {key: value for key, value in task.items() if key not in TRAINING_KEYS}
    with prefixed("task"):
        data = build_data(
            task["dataset"], data_dir=config["data_dir"], seed=config["seed"], options=options
        )
        data.prepare_data()
        data.setup()
    return data


def _require_near(root: Path, folders: list[Path]) -> None:
    where = root.expanduser().resolve()
    if not any(where.is_relative_to(folder.expanduser().resolve()) for folder in folders):
        raise ValueError(
            f"the checkpoint's task reads the folder {short(str(root), 200)}, which is neither "
            "below the working directory nor below data_dir; if you trust the checkpoint, add "
            "trust=true"
        )
