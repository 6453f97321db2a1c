"""The folder of a Job: create a new one, and lock the one in use."""

import contextlib
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from bqnn.text import one_line

OUTPUTS = Path("outputs")  # new folders are created below it


def fresh_folder(name: str) -> str:
    """Create a new folder.

    Args:
        name: The path of the folder.

    Returns:
        The path, with the suffix `_2`, `_3` and so on if it exists.

    Raises:
        ValueError: The folder cannot be created.
    """
    number = 1
    while True:
        folder = Path(name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ValueError(
                f"the folder {one_line(str(folder))} cannot be created ({error.strerror}); choose "
                "one where you may write with hydra.run.dir, or hydra.sweep.dir for a sweep"
            ) from error
        else:
            return str(folder)


class FolderLock:
    """A context manager that locks the folder of a Job.

    The system releases the lock when its process ends.

    Args:
        folder: The folder of the Job.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / ".lock")

    def __enter__(self) -> "FolderLock":
        """Lock the folder, or raise BlockingIOError if another process has locked it."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(f"{self.folder} is being run by another process") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Remove the file before releasing the lock, so that a waiting process sees it is gone.
        with contextlib.suppress(OSError):  # the folder may have been removed
            (self.folder / ".lock").unlink(missing_ok=True)
        self._lock.release()


def is_running(folder: Path) -> bool:
    """Return whether a process runs in a folder, possibly on another machine.

    Args:
        folder: The folder of the Job.
    """
    if not (folder / ".lock").exists():
        return False
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # .lock is not a file, or the file system is read-only
        return False
    lock.release()
    return False
