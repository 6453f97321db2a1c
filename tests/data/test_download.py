"""Downloads are verified, limited, and written only to their folder."""

import gzip
import hashlib
import io
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.request import Request, urlopen

import pytest
from torchvision.datasets import CIFAR10, MNIST

from bqnn.data import download
from bqnn.data.cifar10 import CIFAR10Data
from bqnn.data.download import fetch, unpack
from bqnn.data.mnist import MNISTData

Served = dict[str, bytes]
CONTENT = b"x" * 1000


class Server:
    """Answers every request with a given status, given headers and then parts of a body."""

    def __init__(self) -> None:
        self.status, self.headers = 200, dict[str, str]()
        self.num_requests = 0
        told = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                told.num_requests += 1
                self.send_response(told.status)
                for name, value in told.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(OSError):  # the client hung up, as it should
                    for part in told.body():
                        self.wfile.write(part)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}/a"
        Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def body(self) -> Iterable[bytes]:
        return []


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Start a server that replaces every https address."""
    made, original = Server(), download.urlopen
    monkeypatch.setattr(
        download, "urlopen", lambda url, timeout: original(made.address, timeout=timeout)
    )
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("address", ["http://other.example/\x1b[2J", "ftp://x/a", "//x/a", "/b"])
def test_a_download_does_not_leave_https(server: Server, status: int, address: str) -> None:
    server.status, server.headers = status, {"Location": address}
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        fetch("https://x/a", md5(b""), "do this", kind="md5")
    assert str(error.value).isprintable()
    assert str(error.value).endswith("; do this")
    assert server.num_requests == 1


def test_a_download_follows_redirects_within_https() -> None:
    handler, headers = download._HttpsRedirects(), HTTPMessage()
    follow = partial(
        handler.redirect_request, Request("https://x/a"), io.BytesIO(), 302, "", headers
    )
    followed = follow("https://y/b")
    assert followed is not None
    assert followed.full_url == "https://y/b"
    with pytest.raises(ValueError, match="redirects to 'http://y/b', which is not an https"):
        follow("http://y/b")


def endless(part: bytes, pause: float = 0.0) -> Callable[[], Iterator[bytes]]:
    def body() -> Iterator[bytes]:
        while True:
            time.sleep(pause)
            yield part

    return body


@pytest.mark.parametrize(
    ("headers", "part"),
    [
        ({}, b"x" * 2**16),
        ({"Transfer-Encoding": "chunked"}, b"10000\r\n" + b"x" * 2**16 + b"\r\n"),
        ({"Content-Length": str(10**15)}, b"x"),
    ],
    ids=["no length", "chunks", "a length"],
)
def test_a_body_without_an_end_is_cut_off(
    server: Server, headers: dict[str, str], part: bytes
) -> None:
    server.headers, server.body = headers, endless(part)  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match=r"^https://x/a is refused \(it has more than 1 MiB\); do t"
    ):
        fetch("https://x/a", "", "do this", largest=2**20)


@pytest.mark.parametrize("where", ["body", "headers", "chunk sizes"])
def test_slow_downloads_fail(server: Server, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PATIENCE", 0.3)
    server.body = endless(b"1", pause=0.02)  # type: ignore[method-assign]
    if where == "headers":
        server.headers = {"X": "1"}
        monkeypatch.setattr(
            BaseHTTPRequestHandler, "end_headers", BaseHTTPRequestHandler.flush_headers
        )
    elif where == "chunk sizes":
        server.headers = {"Transfer-Encoding": "chunked"}
    with pytest.raises(
        FileNotFoundError, match=r"cannot be downloaded \(only \d+ bytes in at least 0.3 sec"
    ):
        fetch("https://x/a", "", "do this")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Serve files at every https address; `cut` truncates all of them."""
    files: Served = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[1]
            if name not in files:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[name])))
            self.end_headers()
            self.wfile.write(files[name][: -10 if "cut" in files else None])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def here(url: str, timeout: float) -> object:
        assert url.startswith("https://")
        name = url.rsplit("/", 1)[1]
        return urlopen(f"http://127.0.0.1:{server.server_port}/{name}", timeout=timeout)

    monkeypatch.setattr(download, "urlopen", here)
    yield files
    server.shutdown()
    server.server_close()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_files_with_the_right_hash_are_accepted(served: Served) -> None:
    served["a"] = CONTENT
    assert fetch("https://x/a", hashlib.sha256(CONTENT).hexdigest(), "") == CONTENT
    assert fetch("https://x/a", md5(CONTENT), "", kind="md5") == CONTENT


def test_another_file_a_cut_one_and_none_are_one_line_with_a_remedy(served: Served) -> None:
    get = partial(fetch, digest=md5(CONTENT), remedy="do this", kind="md5")
    served["a"] = CONTENT[:-1]
    with pytest.raises(
        ValueError, match=r"^https://x/a has changed or is damaged [^\n]*; do this$"
    ):
        get("https://x/a")
    served |= {"a": CONTENT, "cut": b""}
    with pytest.raises(
        FileNotFoundError, match=r"^https://x/a cannot be [^\n]*990[^\n]*; do this$"
    ):
        get("https://x/a")
    with pytest.raises(
        FileNotFoundError, match=r"^https://x/b cannot be [^\n]*404[^\n]*; do this$"
    ):
        get("https://x/b")


@pytest.mark.parametrize("url", ["http://x/a", "file:///etc/passwd", "ftp://x/a", "a"])
def test_only_https_is_downloaded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "urlopen", None)
    with pytest.raises(ValueError, match="not an https address"):
        fetch(url, "", "")


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../evil"),
        tarfile.TarInfo("made/../../evil"),
        link("made/evil", "../../evil", tarfile.SYMTYPE),
        link("made/evil", "/etc/passwd", tarfile.SYMTYPE),
        link("made/evil", "../../evil", tarfile.LNKTYPE),
    ],
    ids=lambda info: f"{info.name}->{info.linkname}",
)
def test_an_archive_cannot_leave_its_folder(member: tarfile.TarInfo, tmp_path: Path) -> None:
    good = tarfile.TarInfo("made/good")
    home = tmp_path / "home"
    with pytest.raises(ValueError, match="is refused"):
        unpack(tar_of((good, CONTENT), (member, b"")), home / "made")
    assert list(home.iterdir()) == []
    assert list(tmp_path.iterdir()) == [home]


def test_an_archive_with_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no folder made"):
        unpack(tar_of((tarfile.TarInfo("other/good"), CONTENT)), tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_cifar10_is_unpacked_whole_or_not_at_all(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tar_of((tarfile.TarInfo("cifar-10-batches-py/batches.meta"), CONTENT))
    data = CIFAR10Data(data_dir=str(tmp_path))
    served["cifar-10-python.tar.gz"] = archive
    with pytest.raises(ValueError, match="has changed or is damaged"):
        data.prepare_data()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    data.prepare_data()
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-batches-py"]
    assert (tmp_path / "cifar-10-batches-py" / "batches.meta").read_bytes() == CONTENT
    # Its files are pickles: each is known by its hash before torchvision opens it.
    with pytest.raises(FileNotFoundError, match="is incomplete in"):
        data.setup()


def test_mnist_gets_the_files_that_are_missing_and_keeps_the_others(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name, _ in MNIST.resources]
    for name in names:
        served[name] = gzip.compress(name.encode())
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / names[0].removesuffix(".gz")).write_text("mine")
    monkeypatch.setattr(MNIST, "resources", [(name, md5(served[name])) for name in names])
    served[names[3]] += b"?"
    with pytest.raises(ValueError, match=f"{names[3]} has changed or is damaged"):
        MNISTData(data_dir=str(tmp_path)).prepare_data()
    assert _texts(folder) == {"mine", names[1], names[2]}
    served[names[3]] = gzip.compress(names[3].encode())
    monkeypatch.setattr(MNIST, "resources", [(name, md5(served[name])) for name in names])
    MNISTData(data_dir=str(tmp_path)).prepare_data()
    assert _texts(folder) == {"mine", *names[1:]}


def _texts(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.iterdir()}
