"""New folders are unique, and folders in use are locked."""

from pathlib import Path

import pytest

from bqnn.jobs.folder import fresh_folder, is_running
from bqnn.jobs.job import Job


def test_fresh_folders_are_never_shared(tmp_path: Path) -> None:
    name = str(tmp_path / "runs" / "a")
    assert [fresh_folder(name) for _ in range(3)] == [name, f"{name}_2", f"{name}_3"]
    assert all(path.is_dir() for path in (tmp_path / "runs").iterdir())


def test_a_running_job_is_not_resumed(tmp_path: Path) -> None:
    with Job(tmp_path, "train") as job:
        job.take({"seed": 0}, resume=False)
        assert is_running(tmp_path)
        with pytest.raises(BlockingIOError, match="another process"):
            Job(tmp_path, "train").take({"seed": 0}, resume=True)
    assert not is_running(tmp_path)


def test_a_folder_that_cannot_be_created_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"file/a cannot be created \(Not a directory\); choose one"
    ):
        fresh_folder(str(tmp_path / "file" / "a"))
