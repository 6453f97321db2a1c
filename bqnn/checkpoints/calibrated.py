"""Save a checkpoint with a calibration in its recipe."""

from pathlib import Path

import torch

from bqnn.checkpoints.file import read_checkpoint
from bqnn.checkpoints.schema import check_recipe
from bqnn.files import written_beside
from bqnn.inference.calibration import Calibration


def save_calibrated(source: str | Path, target: Path, calibration: Calibration) -> None:
    """Copy a checkpoint without the state of its training, and add a calibration to its recipe.

    A model that is loaded from the copy calibrates its draws.

    Args:
        source: The path of the checkpoint.
        target: The path of the copy, which is replaced atomically.
        calibration: The calibration, which replaces one that the recipe has.

    Raises:
        ValueError: The source is not a checkpoint of bqnn.
    """
    checkpoint = read_checkpoint(source)
    recipe = {**checkpoint["recipe"], "calibration": calibration.to_dict()}
    check_recipe(recipe)
    with written_beside(target) as beside:
        torch.save({"recipe": recipe, "state_dict": checkpoint["state_dict"]}, beside)
