"""Each match of a pattern is a part with its own folder."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bqnn.jobs.job import Job
from bqnn.jobs.parts import run_parts


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to be found")
def test_parts_have_valid_folders_for_any_name_of_a_task(tmp_path: Path) -> None:
    names = ["é" * 200, "x" * 200, "a/b", "\x1b[2J", ".", "digits"]
    parts: dict[str, Any] = {"checkpoint": "*.ckpt", "method": {"name": "bbb"}}
    ran = []
    with Job(tmp_path, "evaluate") as job:
        job.configure(parts)
        configs = [{**parts, "task": {"name": name}} for name in names]
        run_parts(job, configs, lambda part: ran.append(part.folder.name))
    assert job.state == "DONE"
    assert len(ran) == len(names)
    assert ran[-1] == "5_bbb_digits"
    assert all(name.isascii() and name.isprintable() and len(name) <= 140 for name in ran)
