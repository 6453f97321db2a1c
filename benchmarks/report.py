"""Time the report of many runs: python benchmarks/report.py

The script writes the folders of trained and calibrated runs of four methods on five tasks, with
random numbers, and makes their report in a new process. It prints the seconds of that process, the
seconds of its CPU, and its largest memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hydra import compose, initialize_config_dir
from train_step import configuration

from bqnn.jobs.command_line.configuration import plain
from bqnn.settings.conf import CONF

METHODS = ("pointwise", "bbb", "mcdropout", "sghmc")
TASKS = {
    **dict.fromkeys(("digits", "mnist", "fashion_mnist"), ("error", "nll", "brier", "ece")),
    **dict.fromkeys(("yacht", "wine"), ("rmse", "nll", "crps", "interval_score95")),
}
WIDTHS = (2, 4, 6, 8)
# The peak in /proc is that of this program alone; getrusage counts the parent's memory, too.
REPORT = """
import re, sys, time
from bqnn.report.__main__ import main
main(sys.argv[1:])
with open("/proc/self/status") as file:
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1]) / 1024
print(f"{time.process_time():.1f} s of CPU, {peak:.0f} MB", file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--folder", type=Path, help="where to write runs; a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "runs").exists():
            seeds = arguments.runs // (len(METHODS) * len(TASKS) * (1 + len(WIDTHS)))
            _write_runs(folder / "runs", seeds)
        command = [sys.executable, "-c", REPORT, str(folder / "runs"), "--out", f"{folder}/report"]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"{time.perf_counter() - start:.1f} s; {done.stderr.strip()}")


def _write_runs(folder: Path, seeds: int) -> None:
    random = np.random.default_rng(0)
    for method in METHODS:
        for task, names in TASKS.items():
            for kind, config in _kinds(method, task, folder):
                for seed in range(seeds):
                    _write_run(
                        folder / f"{method}_{task}_{kind}_{seed}", config, seed, names, random
                    )


def _kinds(method: str, task: str, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the configurations of a training, and of its calibrations."""
    trained = configuration(method, task)
    yield "train", trained
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for width in WIDTHS:
            arguments = ["quant.mode=ptq", f"quant.weight_bits={width}", "checkpoint=x.ckpt"]
            config = plain(compose("quantize", arguments))
            described = {group: trained[group] for group in ("method", "net", "task")}
            checkpoint = f"{folder}/{method}_{task}_train_{{seed}}/checkpoint.ckpt"
            yield f"w{width}", {**config, **described, "checkpoint": checkpoint}


def _write_run(
    folder: Path,
    config: dict[str, Any],
    seed: int,
    names: tuple[str, ...],
    random: np.random.Generator,
) -> None:
    config = deepcopy(config) | {"seed": seed}
    stages = [""]
    if "checkpoint" in config:
        config["checkpoint"] = config["checkpoint"].format(seed=seed)
        stages = ["float/", "unquantized/", "simulated/", "int8/"]
    metrics = {f"{stage}test/{name}": random.random() for stage in stages for name in names}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
    status = {"state": "DONE", "start": "2026-01-01T00:00:00+00:00", "error": None}
    (folder / "status.json").write_text(json.dumps(status, indent=2))
    if "checkpoint" in config:
        sizes = {"float_bytes": 4000, "packed_bytes": 500 * config["quant"]["weight_bits"]}
        (folder / "size.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main()
