"""Runs are found by their configuration among other folders."""

import json
from pathlib import Path

import pytest

from bqnn.jobs.identity import config_hash
from bqnn.jobs.job import Job
from bqnn.jobs.runs import find_run
from tests.jobs.status_file import status


def test_a_run_that_is_done_is_found_before_newer_ones(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "deep" / name).mkdir(parents=True)
        with Job(tmp_path / "deep" / name, "train") as job:
            job.take({"seed": 0}, resume=False)
            if name != "b":
                raise ValueError("failed")
    key = config_hash({"seed": 0})
    assert find_run(tmp_path, key) == tmp_path / "deep" / "b"
    (tmp_path / "deep" / "b" / "status.json").unlink()
    assert find_run(tmp_path, key) == tmp_path / "deep" / "c"
    assert find_run(tmp_path, config_hash({"seed": 1})) is None


ODD = {
    "empty": "",
    "list": "[]",
    "nothing": "{}",
    "number": "5",
    "state": '{"state": 5}',
    "state list": '{"state": ["DONE"]}',
    "word": '{"state": "done"}',
    "cut": '{"state": "DO',
}


@pytest.mark.parametrize("content", [*ODD.values(), None], ids=[*ODD, "folder"])
def test_an_invalid_status_is_printed_and_does_not_stop_a_search(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c/d"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a", "c/d"):
        Job(tmp_path / name, "train").take({"seed": 0}, resume=False)
    for folder in ("b", "c"):  # c holds a job below
        if content is None:
            (tmp_path / folder / "status.json").mkdir()
        else:
            (tmp_path / folder / "status.json").write_text(content)
    (tmp_path / "a" / "status.json").unlink()
    capsys.readouterr()
    assert find_run(tmp_path, config_hash({"seed": 0})) == tmp_path / "c" / "d"
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[0] for line in lines] == [f"{tmp_path / n}:" for n in ("b", "c")]
    assert all("status.json" in line for line in lines)
    with pytest.raises(FileExistsError, match=r"status\.json .*remove its status\.json"):
        Job(tmp_path / "b", "train").take({"seed": 0}, resume=True)
    assert not (tmp_path / "b" / "config.yaml").exists()


def test_the_newest_run_is_found_across_a_change_of_utc_offset(tmp_path: Path) -> None:
    starts = {"older": "2026-10-25T02:30:00+02:00", "newer": "2026-10-25T02:15:00+01:00"}
    for name, start in starts.items():
        (tmp_path / name).mkdir()
        with Job(tmp_path / name, "train") as job:
            job.take({"seed": 0}, resume=False)
        changed = {**status(tmp_path / name), "start": start}
        (tmp_path / name / "status.json").write_text(json.dumps(changed))
    assert find_run(tmp_path, config_hash({"seed": 0})) == tmp_path / "newer"
