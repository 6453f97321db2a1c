"""Image files are decoded by several processes, and only once."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bqnn.data import decoding
from bqnn.data.decoding import ImageFormat, decoded

AS_IT_IS = ImageFormat(None, None)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write seven images, which are kept and decoded in chunks of two."""
    monkeypatch.setattr(decoding, "CHUNK", 2)
    monkeypatch.setattr(decoding, "WORTH_KEEPING", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(7):
        write(folder / f"{index}.png", index)
    return folder


def write(path: Path, level: int, size: int = 2) -> None:
    Image.fromarray(np.full((size, size, 3), level, dtype=np.uint8)).save(path)


def paths(root: Path) -> list[str]:
    """Return the paths in another order than that of their names."""
    return [str(root / f"{index}.png") for index in (3, 0, 6, 1, 2, 5, 4)]


def levels(images: Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob(".decoded_*"))


def test_images_are_in_the_order_of_their_paths_and_kept(root: Path) -> None:
    for _ in range(2):
        images = decoded(paths(root), AS_IT_IS, root)
        assert levels(images) == [3, 0, 6, 1, 2, 5, 4]
        assert images.shape == (7, 3, 2, 2)
    assert len(kept(root)) == 1
    assert levels(decoded(paths(root)[:2], AS_IT_IS, root)) == [3, 0]  # other files, other pixels
    gray = decoded(paths(root), ImageFormat(None, 1), root)
    assert gray.shape == (7, 1, 2, 2)
    assert len(kept(root)) == 2  # one for each format


def test_kept_pixels_are_used(root: Path) -> None:
    decoded(paths(root), AS_IT_IS, root)
    (file,) = kept(root)
    np.save(file.with_suffix(".new"), np.full((7, 3, 2, 2), 9, dtype=np.uint8))
    os.replace(f"{file.with_suffix('.new')}.npy", file)
    assert levels(decoded(paths(root), AS_IT_IS, root)) == [9] * 7


def test_a_changed_file_is_decoded_again_and_old_pixels_are_deleted(root: Path) -> None:
    decoded(paths(root), AS_IT_IS, root)
    before = kept(root)
    write(root / "3.png", 200)
    os.utime(root / "3.png", ns=(1, 1))
    assert levels(decoded(paths(root), AS_IT_IS, root))[0] == 200
    assert len(kept(root)) == 1
    assert kept(root) != before


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x93NUMPY\x01\x00v\x00{'descr': '|O'"])
def test_damaged_pixels_are_decoded_again(root: Path, content: bytes) -> None:
    decoded(paths(root), AS_IT_IS, root)
    (file,) = kept(root)
    file.write_bytes(content)
    assert levels(decoded(paths(root), AS_IT_IS, root)) == [3, 0, 6, 1, 2, 5, 4]


def test_pixels_of_a_read_only_folder_are_kept_for_the_user(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = decoding.written_beside

    def refuse(path: Path) -> object:
        if path.parent == root:
            raise PermissionError(f"{path}: read-only")
        return written(path)

    monkeypatch.setattr(decoding, "written_beside", refuse)
    for _ in range(2):
        assert levels(decoded(paths(root), AS_IT_IS, root)) == [3, 0, 6, 1, 2, 5, 4]
    assert not kept(root)
    assert len(kept(tmp_path / "cache")) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # neither place can be written
    assert levels(decoded(paths(root), ImageFormat(None, 1), root)) == [3, 0, 6, 1, 2, 5, 4]


def test_quickly_decoded_images_are_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "WORTH_KEEPING", 1e9)
    decoded(paths(root), AS_IT_IS, root)
    assert not kept(root)


def test_several_processes_decode_the_same_and_find_the_first_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "WORTH_PROCESSES", 0.0)
    monkeypatch.setattr(decoding, "WORTH_KEEPING", 1e9)
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    images = decoded(paths(root), AS_IT_IS, root)
    assert levels(images) == [3, 0, 6, 1, 2, 5, 4]
    write(root / "4.png", 0, size=3)  # the last one
    (root / "5.png").write_bytes(b"no image")  # the last but one
    with pytest.raises(ValueError, match=r"5\.png cannot be read as an image"):
        decoded(paths(root), AS_IT_IS, root)
    write(root / "5.png", 5)
    with pytest.raises(ValueError, match=r"4\.png is 3x3 with 3 channels, but .*3\.png is 2x2"):
        decoded(paths(root), AS_IT_IS, root)


def test_a_process_that_dies_loses_no_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures.process import BrokenProcessPool

    def die(chunks: list[list[str]], form: ImageFormat) -> object:
        yield decoding.decode_many(chunks[0], *form)
        raise BrokenProcessPool("no memory")

    monkeypatch.setattr(decoding, "WORTH_PROCESSES", 0.0)
    monkeypatch.setattr(decoding, "_in_processes", die)
    images = decoded(paths(root), AS_IT_IS, root)
    assert levels(images) == [3, 0, 6, 1, 2, 5, 4]
    assert images.dtype == torch.uint8
