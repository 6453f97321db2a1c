"""Hand-written folders of runs, with numbers that are easy to compute with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Write the files of a run below `runs`: of quantize.py if bits are given, else of train.py."""

    def write(
        name: str,
        metrics: dict[str, float],
        *,
        method: str = "bbb",
        lr: float = 0.1,
        task: str = "digits",
        seed: int = 0,
        split: int | None = None,
        bits: tuple[int, int] | None = None,
        mode: str = "ptq",
        size: int | None = None,
        state: str | None = "DONE",
        start: str = "2026-01-01T00:00:00",
        **config: Any,
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        whole: dict[str, Any] = {
            "method": {"name": method, "optimizer": {"lr": lr}},
            "task": {"name": task} if split is None else {"name": task, "split": split},
            "seed": seed,
            "quant": {"name": "none"},
            "trainer": {"max_epochs": 3, "threads": None},
        }
        if bits is not None:
            quant = {"name": "default", "mode": mode}
            whole["quant"] = quant | dict(
                zip(("weight_bits", "activation_bits"), bits, strict=True)
            )
            whole["checkpoint"] = f"float/{method}_{seed}/checkpoint.ckpt"
        (folder / "config.yaml").write_text(yaml.safe_dump(whole | config))
        (folder / "metrics.json").write_text(json.dumps(metrics))
        if size is not None:
            sizes = {"float_bytes": 4 * size, "packed_bytes": size}
            (folder / "size.json").write_text(json.dumps(sizes))
        if state is not None:
            status = {"state": state, "start": start, "error": None}
            (folder / "status.json").write_text(json.dumps(status))
        return folder

    return write


@pytest.fixture
def sweep(write_run: WriteRun, tmp_path: Path) -> Path:
    """Write two methods, two seeds, and 2, 4 and 8 weight bits.

    NLL is 1 in float and 1 + 1 / bits in int8. bbb is better than pointwise by 0.5, and seed 1
    better than seed 0 by 0.1.
    """
    for method, better in (("bbb", 0.5), ("pointwise", 0.0)):
        for seed in (0, 1):
            nll = 1 - better - 0.1 * seed
            write_run(f"train/{method}_{seed}", {"test/nll": nll}, method=method, seed=seed)
            for bits in (2, 4, 8):
                metrics = {"float/test/nll": nll, "int8/test/nll": nll + 1 / bits}
                metrics |= {f"{stage}/test/error": nll / 10 for stage in ("float", "int8")}
                write_run(
                    f"ptq/{method}_{seed}_{bits}", metrics, method=method, seed=seed,
                    bits=(bits, 7), size=1000 * bits,
                )  # fmt: skip
    return tmp_path / "runs"
