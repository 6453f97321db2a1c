"""Claim a folder for a Job: an unused folder, or the folder of an earlier process of the Job."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bqnn.jobs.folder import FolderLock
from bqnn.jobs.identity import config_hash, is_prolonged, is_same
from bqnn.jobs.provenance import changes_since
from bqnn.jobs.runs import is_finished
from bqnn.jobs.status import RunStatus, read_status

log = logging.getLogger(__name__)

# The files that Jobs write. A Job refuses a folder that holds one of another owner.
WRITTEN = (
    *("config.yaml", "checkpoint.ckpt", "best.ckpt", "predictions.npz", "uncertainty.npz"),
    *("metrics.csv", "metrics.json", "size.json", "quantization.csv", "risk_coverage.csv"),
    *("curves.png", "reliability.png", "confidence.png", "fit.png", "interval_calibration.png"),
    *("weights.png", "risk_coverage.png", "shift.png", "ood.png", "convergence.png"),
)


@dataclass(frozen=True)
class Claim:
    """A folder that this process has locked for a Job.

    Args:
        lock: Closing it unlocks the folder.
        earlier: The status that an earlier process left, or None.
        is_resumed: Whether the earlier process had this configuration.
        is_prolonged: Whether the earlier process had this configuration with fewer epochs.
    """

    lock: ExitStack
    earlier: RunStatus | None = None
    is_resumed: bool = False
    is_prolonged: bool = False


def claim_unused(folder: Path) -> Claim:
    """Lock a folder in which no Job has run.

    Args:
        folder: The folder.

    Returns:
        The claim.

    Raises:
        FileExistsError: The folder holds an earlier Job, or a file that the Job would overwrite.
            The folder is unchanged.
        BlockingIOError: Another process runs in the folder.
    """
    with ExitStack() as lock:
        lock.enter_context(FolderLock(folder))
        if (folder / "status.json").exists():
            raise FileExistsError(
                f"{folder} already holds a job (status.json is there); give another "
                "hydra.run.dir, or none to get a new folder, or resume the job (resume=true)"
            )
        if foreign := next((name for name in WRITTEN if (folder / name).exists()), None):
            raise FileExistsError(
                f"{folder} holds {foreign}, which the job would overwrite; move it away, or "
                "give another hydra.run.dir, or none to get a new folder"
            )
        return Claim(lock.pop_all())


def claim_again(folder: Path, config: dict[str, Any], may_be_prolonged: bool) -> Claim | None:
    """Lock a folder in which an earlier process may have run the same Job.

    Args:
        folder: The folder.
        config: The resolved configuration of the Job.
        may_be_prolonged: Whether the earlier process may have had fewer epochs.

    Returns:
        The claim, or None if the Job is DONE.

    Raises:
        FileExistsError: The folder holds another Job, or one with an unreadable status.
        BlockingIOError: Another process runs in the folder.
    """
    key = config_hash(config)
    if is_finished(read_status(folder), key):
        return None
    with ExitStack() as lock:
        lock.enter_context(FolderLock(folder))
        earlier = read_status(folder)
        if is_finished(earlier, key):  # it ended before this process got the lock
            return None
        prolonged = may_be_prolonged and is_prolonged(folder, config)
        same = earlier is not None and is_same(earlier.config_hash, key)
        if earlier is not None and not (prolonged or same):
            _require_unconfigured(folder, earlier)
        for part in folder.glob(".*.part"):  # left behind by a killed process
            part.unlink()
        if earlier is not None and (prolonged or same):
            _warn_of_changes(earlier)
        return Claim(lock.pop_all(), earlier, prolonged or same, prolonged)


def _require_unconfigured(folder: Path, status: RunStatus) -> None:
    """Raise FileExistsError, unless the Job was killed before its configuration was set."""
    if status.is_unreadable:
        raise FileExistsError(
            f"{folder} holds an unknown job ({status.error}); remove its status.json "
            "to start a new job there, or give another hydra.run.dir, or none"
        )
    if status.config_hash is not None:
        raise FileExistsError(
            f"{folder} holds a job with another configuration, or of a checkpoint that has changed "
            "since, which resume=true cannot resume; give another hydra.run.dir, or none"
        )


def _warn_of_changes(status: RunStatus) -> None:
    if changes := changes_since(status.versions, status.git_commit):
        log.warning(
            "resumed with %s: the results may differ in their last bits from those of a run that "
            "was never interrupted",
            changes,
        )
