"""Find the rank of this process among those that train one model."""

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

# The launchers that Lightning recognizes, and for each the environment variables that mark it,
# hold the rank, and hold the number of processes. A parent is Lightning itself, or a user.
LAUNCHERS = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"),
    "srun": ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_NTASKS"),
    "jsrun": ("LSB_DJOB_RANKFILE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    "parent": ("MASTER_PORT", "LOCAL_RANK", "WORLD_SIZE"),
}
# The variables from which Lightning or torch infers that a process is one of several.
VARIABLES = [
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE"),
    *("SLURM_PROCID", "JSM_NAMESPACE_RANK"),
]


class Place(NamedTuple):
    """The rank of a process and its launcher.

    Args:
        rank: The rank, from 0.
        launcher: A key of `LAUNCHERS`, or None if nothing outside of bqnn started the process.
    """

    rank: int
    launcher: str | None


ALONE = Place(0, None)


def find_place(trainer: Mapping[str, Any]) -> Place:
    """Read the rank from the environment, if the trainer uses several devices.

    Clusters set the same variables for unrelated processes, so a trainer with one device ignores
    them.

    Args:
        trainer: The group `trainer` of the configuration.

    Returns:
        The rank and the launcher.

    Raises:
        ValueError: The number of processes differs from the number of devices, or there are
            several machines and the environment does not identify this one.
    """
    devices, nodes = _num_devices(trainer.get("devices", 1)), _whole(trainer.get("num_nodes")) or 1
    if devices == 1 and nodes == 1:
        return ALONE
    node = _whole(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK"))) or 0
    for launcher, (mark, rank_key, size_key) in LAUNCHERS.items():
        rank, size = (_whole(os.environ.get(key)) for key in (rank_key, size_key))
        if mark not in os.environ or rank is None or size is None or not 0 <= rank < size > 1:
            continue
        if launcher == "srun" and os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
            continue  # an interactive Slurm session starts one process
        if devices is not None and size != devices * nodes:
            raise ValueError(
                f"trainer.devices={trainer.get('devices')}: {size_key}={size} processes were "
                f"started to train one model; start {devices * nodes}, or unset {rank_key}"
            )
        return Place(rank + node * (size // nodes) if launcher == "parent" else rank, launcher)
    if nodes == 1:
        return ALONE
    if not {"NODE_RANK", "GROUP_RANK"} & os.environ.keys():
        raise ValueError(
            f"trainer.num_nodes={nodes}: the environment does not identify this machine; start "
            "with torchrun or srun, or set NODE_RANK, MASTER_ADDR and MASTER_PORT on each machine"
        )
    return Place(node * (devices or 1), "parent")


def hide_launcher() -> dict[str, str]:
    """Remove the variables of ranks from the environment of a single process.

    Returns:
        The removed variables and their values.
    """
    return {key: os.environ.pop(key) for key in VARIABLES if key in os.environ}


def _num_devices(devices: object) -> int | None:
    """Return the number of devices as Lightning reads it, or None for all available devices."""
    if isinstance(devices, list | tuple):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    number = _whole(devices)
    return number if number is not None and number > 0 else None


def _whole(value: object) -> int | None:
    with suppress(TypeError, ValueError):
        return int(value)  # type: ignore[call-overload]
    return None
