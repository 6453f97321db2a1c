"""Find the checkpoint files of a path or a pattern without opening them."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from glob import glob
from pathlib import Path

from bqnn.jobs.typed import command_line

CHECKPOINT = "checkpoint.ckpt"


def locate(key: str, path: str) -> Path:
    """Return the checkpoint file at a path.

    Args:
        key: The configuration key of the path, for the error message.
        path: A file, or the folder of a Run, which stands for its checkpoint. `~` is expanded.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: There is no such file, or the folder has no checkpoint.
    """
    found = Path(path).expanduser()
    if os.path.isdir(found):
        if not _may_hold(found):
            raise FileNotFoundError(
                f"{key}={path}: there is no {CHECKPOINT} in this folder; give the folder of a run, "
                f"or a file, or a pattern as in '{key}={path}/**/{CHECKPOINT}'"
            )
        return found / CHECKPOINT
    if not os.path.exists(found):  # Path.exists raises if the name is too long
        raise _missing(key, path)
    return found


def locate_all(key: str, pattern: str) -> list[Path]:
    """Return the checkpoint file at a path, or all matches of a pattern.

    If a pattern also matches folders, the matches are their checkpoints and files named *.ckpt.
    Unreadable matches are included, so that each fails on its own, with its reason.

    Args:
        key: The configuration key of the pattern, for the error message.
        pattern: A path, or a pattern in which `**` matches any number of folders.

    Returns:
        The sorted paths of the files.

    Raises:
        FileNotFoundError: There is no such file, or nothing matches.
    """
    if not is_pattern(pattern):
        return [locate(key, pattern)]
    matches = _matches(Path(pattern).expanduser())
    folders = {path for path in matches if os.path.isdir(path)}
    files = set(matches) - folders
    if folders:
        files = {path for path in files if path.suffix == ".ckpt"}
    files |= {path / CHECKPOINT for path in folders if _may_hold(path)}
    # A folder in the place of a file is an unreadable match.
    files |= {path for path in folders if path.suffix == ".ckpt" and path / CHECKPOINT not in files}
    if not files:
        raise _missing(key, pattern)
    return sorted(files)


def is_pattern(path: str) -> bool:
    """Return whether a path has one of the characters `*?[` and does not exist.

    Args:
        path: The path; `~` is expanded.
    """
    is_there = os.path.exists(Path(path).expanduser())
    return not is_there and any(character in path for character in "*?[")


def canonical(key: str, path: str) -> str:
    """Return the canonical form of a path, which is part of the identity of a Run.

    Args:
        key: The configuration key of the path, for the error message.
        path: A path or a pattern.

    Returns:
        The path of the checkpoint file. In a pattern, only `~` is expanded.

    Raises:
        FileNotFoundError: There is no such file, or nothing matches.
    """
    if is_pattern(path):
        locate_all(key, path)
        return str(Path(path).expanduser())
    return str(locate(key, path))


def _may_hold(folder: Path) -> bool:
    """Return whether a folder has a checkpoint, including a broken link, or is unreadable."""
    try:
        os.lstat(folder / CHECKPOINT)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _matches(pattern: Path) -> list[Path]:
    """Return the matches of a pattern; `**` enters each folder once, even through links.

    `glob` follows a link to a parent folder as often as the system allows, so a folder with two
    such links takes exponential time.
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
    """Yield the matches of the parts of a pattern below each folder."""
    for head in heads:
        if parts:
            pattern = str(Path(*parts))
            with suppress(OSError):  # the name is too long for a file
                yield from (head / match for match in glob(pattern, root_dir=head))
        else:
            yield head


def _folders(tops: Iterable[Path]) -> Iterator[Path]:
    """Yield each folder and each visible folder below it once."""
    seen: set[tuple[int, int]] = set()
    for top in tops:
        for name, below, _ in os.walk(top, followlinks=True):
            try:
                found = os.stat(name)
            except OSError:  # the folder was removed in the meantime
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
        f"{key}: no checkpoint at {path}: no such file; train one ({command_line('train')}), or "
        "give the path of a .ckpt file, the folder of a run or a pattern, "
        f"'{key}=outputs/**/{CHECKPOINT}'"
    )
