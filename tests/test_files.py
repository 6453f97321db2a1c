"""Atomic file writes."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from bqnn.files import append_text, write_json, write_text, written_beside
from bqnn.training.callbacks import save_checkpoint


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), written_beside(path) as beside:
        beside.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_takes_finite_numbers_only(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": value})
    assert list(tmp_path.iterdir()) == []


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Limit the size of files; the system refuses larger ones as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_of_one_line_and_keeps_the_old_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match=r"a\.txt cannot be written \([^\n]+\)[^\n]+$"), room_for(100):
        write_text(path, "new" * 1000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one\n")
    append_text(path, "two\n")
    with pytest.raises(OSError, match=r"a\.txt cannot be written \([^\n]+\)[^\n]+$"), room_for(100):
        append_text(path, "three" * 1000)
    assert path.read_text() == "one\ntwo\n"


def test_a_missing_or_invalid_folder_is_an_error_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("gone", "file"):
        path = tmp_path / folder / "a.txt"
        with pytest.raises(OSError, match=rf"{path} cannot be written \([^\n]+\)"):
            write_text(path, "new")


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    path = tmp_path / "checkpoint.ckpt"
    save_checkpoint(trainer, Wide(10), path)
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"checkpoint\.ckpt cannot be written"), room_for(100_000):
        save_checkpoint(trainer, Wide(1_000_000), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_utf_8_under_every_locale(tmp_path: Path) -> None:
    code = "from pathlib import Path; from bqnn.files import write_csv, write_text; "
    code += "write_text(Path('a.txt'), '\\xe9'); write_csv(Path('a.csv'), [{'x': '\\xe9'}])"
    root = str(Path(__file__).resolve().parents[1])
    narrow = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": root}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **narrow}, check=True, timeout=60)
    assert (tmp_path / "a.txt").read_bytes() == "é".encode()
    assert "é".encode() in (tmp_path / "a.csv").read_bytes()


class Wide(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))
