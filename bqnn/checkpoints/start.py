"""Initialize a training from the checkpoint of another run."""

from bqnn.arguments import ArgumentError, renamed
from bqnn.checkpoints.file import read_checkpoint
from bqnn.methods import PointwiseStart
from bqnn.text import printable


def start_from(model: PointwiseStart, path: str) -> None:
    """Initialize a method from a pointwise run of the same network.

    Args:
        model: The model. Call this before a Trainer gets it, because callbacks may change its
            network.
        path: The checkpoint of the pointwise run.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a checkpoint, not from a pointwise run, or of another network.
    """
    checkpoint, where = read_checkpoint(path), f"init_from={printable(path)}"
    method = checkpoint["recipe"]["method"]
    if method["name"] != "pointwise" or "_target_" in method:
        name = method["name"]
        raise ArgumentError(f"{where}: this is a {name} run; give a pointwise run", "init_from")
    with renamed({"state": where}.__getitem__):
        model.initialize_from(checkpoint["state_dict"])
