"""A Run is recognized by what its results depend on."""

import os
from pathlib import Path

import pytest

from bqnn.jobs.identity import config_hash
from bqnn.jobs.job import Job
from bqnn.jobs.runs import find_run


def test_a_job_is_recognized_by_what_its_results_depend_on() -> None:
    config = {"seed": 0, "resume": False, "logger": {"name": "none"}, "trainer": {"threads": 1}}
    same = {"seed": 0, "data_dir": "x", "logger": {}, "trainer": {"progress_bar": False}}
    assert config_hash(config) == config_hash(same)
    assert config_hash(config) != config_hash({**config, "seed": 1})
    assert "threads" in config["trainer"]


@pytest.mark.parametrize("group", [None, "method"])
def test_a_job_is_recognized_by_what_its_checkpoint_holds(
    group: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.ckpt"
    path.write_bytes(b"first")
    for where in (path, tmp_path):  # of a run's folder, the checkpoint in it
        start: dict[str, object] = {"checkpoint": str(where)}
        config = start if group is None else {group: {"init_from": str(where)}}
        run = tmp_path / f"run_{where.name}"
        run.mkdir()

        def is_recognized(config: dict = config, run: Path = run) -> bool:
            key = config_hash(config)
            return find_run(run, key) == run

        path.write_bytes(b"first")
        with Job(run, "train") as job:
            job.take(config, resume=False)
        assert is_recognized()
        path.write_bytes(b"other")  # of the same length
        assert not is_recognized()
        with pytest.raises(FileExistsError, match="changed since"):
            Job(run, "train").take(config, resume=True)
        path.unlink()
        assert is_recognized()  # nothing says that it is another one
        os.mkfifo(path)
        assert is_recognized()
        path.unlink()
