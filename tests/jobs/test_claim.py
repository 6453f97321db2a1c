"""A folder belongs to one Job, and only this Job can continue in it."""

import json
import re
from pathlib import Path

import pytest

from bqnn.jobs.identity import config_hash
from bqnn.jobs.job import Job
from bqnn.jobs.runs import find_run
from bqnn.jobs.status import read_status
from tests.jobs.status_file import status


def test_a_folder_belongs_to_one_job(tmp_path: Path) -> None:
    with Job(tmp_path, "train") as job:
        job.claim()
    before = (tmp_path / "status.json").read_text()
    with Job(tmp_path, "train") as second:
        second.claim()
    assert second.state == "FAILED"
    assert "already holds a job" in (second.status.error or "")
    assert (tmp_path / "status.json").read_text() == before


def test_a_job_killed_before_it_was_configured_is_taken_over(tmp_path: Path) -> None:
    Job(tmp_path, "train").claim()
    (tmp_path / ".checkpoint.ckpt.1.part").touch()
    with Job(tmp_path, "train") as job:
        assert job.take({"seed": 0}, resume=True)
        assert not job.is_resumed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "status.json"]
    again = Job(tmp_path, "train")
    assert not again.take({"seed": 0}, resume=True)
    with pytest.raises(FileExistsError, match="another configuration"):
        again.take({"seed": 1}, resume=True)


def test_a_job_whose_status_is_none_is_recognized_by_its_configuration(tmp_path: Path) -> None:
    config = {"seed": 0, "method": {"optimizer": {"lr": 1e-5}}}
    with Job(tmp_path, "train") as job:
        job.take(config, resume=False)
    (tmp_path / "status.json").write_text("")
    with Job(tmp_path, "train") as again:
        assert again.take(config, resume=True)
        assert again.is_resumed
    assert status(tmp_path)["state"] == "DONE"
    (tmp_path / "status.json").write_text("")
    with pytest.raises(FileExistsError, match="status"):
        Job(tmp_path, "train").take({"seed": 1}, resume=True)


ODD_VALUES: list[object] = [None, 5, "", "../yesterday", [], {"a": 1}]


@pytest.mark.parametrize("odd", ODD_VALUES)
def test_a_status_with_odd_values_is_that_of_its_job(odd: object, tmp_path: Path) -> None:
    with Job(tmp_path, "train") as job:
        job.take({"seed": 0}, resume=False)
    names = ("start", "end", "error", "id", "versions", "git_commit", "host", "parts")
    changed = {**status(tmp_path), **dict.fromkeys(names, odd), "state": "INTERRUPTED"}
    (tmp_path / "status.json").write_text(json.dumps(changed))
    assert find_run(tmp_path, config_hash({"seed": 0})) == tmp_path
    with Job(tmp_path, "train") as again:
        assert again.take({"seed": 0}, resume=True)
    assert again.is_resumed
    assert re.fullmatch("[0-9a-f]{8}", status(tmp_path)["id"])
    found = read_status(tmp_path)
    assert found is not None
    assert found.state == "DONE"


def test_a_resumed_job_says_which_versions_have_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def resume(**changes: object) -> list[str]:
        (tmp_path / "status.json").write_text(json.dumps({**status(tmp_path), **changes}))
        caplog.clear()
        with Job(tmp_path, "train") as job:
            job.take({"seed": 0}, resume=True)
        return [record.getMessage() for record in caplog.records]

    with Job(tmp_path, "train") as job:
        job.take({"seed": 0}, resume=False)
    versions = status(tmp_path)["versions"]
    assert resume(state="INTERRUPTED") == []
    (line,) = resume(
        state="INTERRUPTED", versions={**versions, "torch": "1.0"}, git_commit="abcdef"
    )
    assert f"torch {versions['torch']} instead of '1.0'" in line
    assert "instead of 'abcdef'" in line
    assert line.isprintable()
    assert resume(state="DONE", git_commit="abcdef") == []  # nothing runs
