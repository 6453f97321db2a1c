"""Find the checkpoint files of a path or a pattern, without opening them."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from glob import glob
from pathlib import Path

CHECKPOINT = "checkpoint.ckpt"


def locate(key: str, path: str) -> Path:
    """Return the file at a path. `~` is expanded; a run's folder stands for its checkpoint.

    Args:
        key: The key of the configuration that holds the path, for the message.
        path: As it was given.

    Raises:
        FileNotFoundError: There is none.
    """
    found = Path(path).expanduser()
    if os.path.isdir(found):
        if not _may_hold(found):
            raise FileNotFoundError(
                f"{key}={path}: there is no {CHECKPOINT} in this folder; give the folder of a run, "
                f"or a file, or a pattern as in '{key}={path}/**/{CHECKPOINT}'"
            )
        return found / CHECKPOINT
    if not os.path.exists(found):  # not Path.exists, which raises for too long a name
        raise _missing(key, path)
    return found


def locate_all(key: str, pattern: str) -> list[Path]:
    """Return the file at a path, or all matches of a pattern; `**` matches any folders.

    Of a pattern that also matches folders, only their checkpoints and files named *.ckpt count,
    those that cannot be read included: each fails alone then, with its reason.

    Raises:
        FileNotFoundError: There is none.
    """
    if not is_pattern(pattern):
        return [locate(key, pattern)]
    matches = _matches(Path(pattern).expanduser())
    folders = {path for path in matches if os.path.isdir(path)}
    files = set(matches) - folders
    if folders:
        files = {path for path in files if path.suffix == ".ckpt"}
    files |= {path / CHECKPOINT for path in folders if _may_hold(path)}
    # A folder in the place of a file is one of the matches that cannot be read.
    files |= {path for path in folders if path.suffix == ".ckpt" and path / CHECKPOINT not in files}
    if not files:
        raise _missing(key, pattern)
    return sorted(files)


def is_pattern(path: str) -> bool:
    """Return whether a path is a pattern. An existing file with such a name is not."""
    is_there = os.path.exists(Path(path).expanduser())
    return not is_there and any(character in path for character in "*?[")


def canonical(key: str, path: str) -> str:
    """Return the canonical form of a path, which identifies a run; a pattern is unchanged.

    Raises:
        FileNotFoundError: There is no such file, or nothing that the pattern matches.
    """
    if is_pattern(path):
        locate_all(key, path)
        return str(Path(path).expanduser())
    return str(locate(key, path))


def _may_hold(folder: Path) -> bool:
    """Whether a folder has a checkpoint, be it a link to nowhere, or nobody can tell."""
    try:
        os.lstat(folder / CHECKPOINT)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _matches(pattern: Path) -> list[Path]:
    """What a pattern matches; `**` enters each folder once, whatever links lead to it again.

    `glob` follows a link to a folder above as often as the system lets it: a folder with two such
    links takes exponential time.
    """
    heads: Iterable[Path] = [Path(pattern.anchor)]
    parts: list[str] = []
    for part in pattern.relative_to(pattern.anchor).parts:
        if part == "**":
            heads = list(_folders(_below(heads, parts)))
            parts = []
        else:
            parts.append(part)
    found = list(_below(heads, parts))
    return [*found, *_below(heads, ["*"])] if pattern.name == "**" else found


def _below(heads: Iterable[Path], parts: list[str]) -> Iterator[Path]:
    """What the parts of a pattern match below each of some folders."""
    for head in heads:
        if parts:
            pattern = str(Path(*parts))
            with suppress(OSError):  # no file has a name that long
                yield from (head / match for match in glob(pattern, root_dir=head))
        else:
            yield head


def _folders(tops: Iterable[Path]) -> Iterator[Path]:
    """Folders and all visible ones below them, each once."""
    seen: set[tuple[int, int]] = set()
    for top in tops:
        for name, below, _ in os.walk(top, followlinks=True):
            try:
                found = os.stat(name)
            except OSError:  # removed meanwhile
                continue
            if (found.st_dev, found.st_ino) in seen:
                below.clear()
                continue
            seen.add((found.st_dev, found.st_ino))
            visible = [each for each in below if not each.startswith(".")]
            below[:] = sorted(visible, key=lambda each: (Path(name, each).is_symlink(), each))
            yield Path(name)


def _missing(key: str, path: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{key}: no checkpoint at {path}: no such file; train one (python train.py), or give the "
        f"path of a .ckpt file, the folder of a run or a pattern, '{key}=outputs/**/{CHECKPOINT}'"
    )
