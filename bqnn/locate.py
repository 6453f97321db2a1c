"""Which checkpoint files a path or a pattern of the command line stands for; no file is opened."""

from glob import glob
from pathlib import Path

CHECKPOINT = "checkpoint.ckpt"


def locate(key: str, path: str) -> Path:
    """The file at a path: `~` is a home folder, and a run's folder stands for its checkpoint.

    Args:
        key: The key of the configuration that holds the path, for the message.
        path: As it was given.

    Raises:
        FileNotFoundError: There is none.
    """
    found = Path(path).expanduser()
    if found.is_dir():
        if not (found / CHECKPOINT).exists():
            raise FileNotFoundError(
                f"{key}={path}: there is no {CHECKPOINT} in this folder; give the folder of a run, "
                f"or a file, or a pattern as in '{key}={path}/**/{CHECKPOINT}'"
            )
        return found / CHECKPOINT
    if not found.exists():
        raise _missing(key, path)
    return found


def locate_all(key: str, pattern: str) -> list[Path]:
    """The files at a path, or all that a pattern matches, where `**` stands for any folders.

    Of a pattern that also matches folders, only their checkpoints and files named *.ckpt count.

    Raises:
        FileNotFoundError: There is none.
    """
    if not is_pattern(pattern):
        return [locate(key, pattern)]
    matches = [Path(match) for match in glob(str(Path(pattern).expanduser()), recursive=True)]
    folders = {path for path in matches if path.is_dir()}
    files = set(matches) - folders
    if folders:
        files = {path for path in files if path.suffix == ".ckpt"}
    files |= {path / CHECKPOINT for path in folders if (path / CHECKPOINT).exists()}
    if not files:
        raise _missing(key, pattern)
    return sorted(files)


def is_pattern(path: str) -> bool:
    """Whether a path is none, but has characters of a pattern; a file may be named like one."""
    return not Path(path).expanduser().exists() and any(character in path for character in "*?[")


def canonical(key: str, path: str) -> str:
    """A path as `locate` finds it, by which a run is recognized again; a pattern stays one.

    Raises:
        FileNotFoundError: There is no such file, or nothing that the pattern matches.
    """
    if is_pattern(path):
        locate_all(key, path)
        return str(Path(path).expanduser())
    return str(locate(key, path))


def _missing(key: str, path: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{key}: no checkpoint at {path}: no such file; train one (python train.py), or give the "
        f"path of a .ckpt file, the folder of a run or a pattern, '{key}=outputs/**/{CHECKPOINT}'"
    )
