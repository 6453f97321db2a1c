"""Runs found on disk, as tables; and what was found that could not become a row."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bqnn.report.settings import flatten, method_labels, setting_labels

if TYPE_CHECKING:
    from pandas import DataFrame

FILES = ("metrics.json", "config.yaml", "status.json")
STAGES = ("float", "unquantized", "simulated", "int8")

UNIT = ["seed", "split"]  # what runs are repeated over
CELL = ["task", "verb", "mode", "method", "setting", "weight_bits", "activation_bits"]


@dataclass
class Run:
    """A finished job: its folder, configuration and metrics, and when it started."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, float]
    started: str

    @property
    def verb(self) -> str:
        """The script that ran."""
        if "checkpoint" not in self.config:
            return "train"
        return "evaluate" if "numeric" in self.config else "quantize"

    @cached_property
    def options(self) -> dict[str, str]:
        """All that may have made its numbers what they are, flat: see `bqnn.report.settings`."""
        training = {"trainer": self.source.get("trainer", {})}
        if "fine_tuning" in self.source.get("quant", {}):  # what is evaluated was quantized
            training["fine_tuning"] = self.source["quant"]["fine_tuning"]
        flat = flatten(self.config) | flatten(training, "trained.")
        if "checkpoint" in flat:
            flat["trained.seed"] = "own" if self.fine_tuning_seed is None else flat["seed"]
            flat["checkpoint"] = Path(flat["checkpoint"]).name
        if flat["quant.name"] == "checkpoint" and self.source:
            flat["quant.name"] = self.source["quant"]["name"]
        if flat.get("method.init_from", "None") != "None":
            flat["method.init_from"] = "checkpoint"
        return flat

    @cached_property
    def source(self) -> dict[str, Any]:
        """The configuration of the run whose checkpoint was given, where that is still there."""
        if "checkpoint" not in self.config:
            return {}
        # The path may start from where the job was, which is often above the folder that it left.
        given = Path(self.config["checkpoint"]).parent / "config.yaml"
        for path in (given, *(parent / given for parent in self.folder.absolute().parents)):
            try:
                config = _yaml(path)
            except (OSError, ValueError, yaml.YAMLError):
                continue
            return config if isinstance(config.get("quant"), dict) else {}
        return {}

    @property
    def fine_tuning_seed(self) -> int | None:
        """Of its own fine-tuning, or of that of the network it evaluates; of calibrations none."""
        if self.config["quant"].get("mode") != "qat":
            return None
        for config in (self.config, self.source):
            seed = config.get("quant", {}).get("fine_tuning", {}).get("seed")
            if seed is not None:
                return int(seed)
        return None

    def row(self) -> dict[str, Any]:
        """What tells the run apart; bits are None for a float one, a split where there is none.

        The seed is that of the fine-tuning where it has one of its own.
        """
        tuned = self.fine_tuning_seed
        quant = self.config["quant"]
        is_float = quant["name"] == "none"
        return {
            "run": str(self.folder),
            "started": self.started,
            "task": self.config["task"]["name"],
            "verb": self.verb,
            "mode": "float" if is_float else quant["mode"],
            "method": self.config["method"]["name"],
            "weight_bits": None if is_float else quant["weight_bits"],
            "activation_bits": None if is_float else quant["activation_bits"],
            "seed": self.config["seed"] if tuned is None else tuned,
            "split": self.config["task"].get("split"),
        }

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The bytes of its parameters, where it has quantized them."""
        path = self.folder / "size.json"
        return {f"size/{name}": n for name, n in _json(path).items()} if path.exists() else {}

    def scores(self) -> Iterator[tuple[str, str, float]]:
        """(numeric, metric, value) of what was evaluated: ("int8", "test/nll", 0.03)."""
        default = "float" if self.config["quant"]["name"] == "none" else "simulated"
        for key, value in self.metrics.items():
            head, _, rest = key.partition("/")
            if head in STAGES:
                yield head, rest, value
            elif rest and head != "time":
                yield default, key, value


@dataclass(frozen=True)
class Problem:
    """A run that is not among the numbers, and why."""

    run: str
    state: str
    reason: str


@dataclass(frozen=True)
class Runs:
    """What a report is made of.

    runs: a row per run, `CELL`, `UNIT`, then every metric and size. scores: a row per run and
    number: CELL, UNIT, numeric, metric, value.
    """

    runs: "DataFrame"
    scores: "DataFrame"
    problems: list[Problem]


def read_runs(folders: Iterable[Path]) -> Runs:
    """Read every run below the folders. FileNotFoundError: a folder is not there."""
    found = find(folders)
    parents = {parent for folder in found for parent in folder.parents}
    finished, problems = [], []
    for folder in found:
        run = read(folder, has_parts=folder in parents)
        if isinstance(run, Run):
            finished.append(run)
        elif run is not None:
            problems.append(run)
    return _tables(finished, problems)


def find(folders: Iterable[Path]) -> list[Path]:
    """Every folder with one of a run's files, but for those that W&B keeps below a run."""
    found = set()
    for top in folders:
        if not top.is_dir():
            raise FileNotFoundError(f"{top}: no such folder; give folders with runs in them")
        for name, below, files in os.walk(top):
            below[:] = [each for each in below if each != "wandb"]
            if not {*files}.isdisjoint(FILES):
                found.add(Path(name))
    return sorted(found)


def read(folder: Path, has_parts: bool) -> Run | Problem | None:
    """The run in a folder, or why there is none; None for one that only holds its parts' folders.

    metrics.json and config.yaml are enough: without status.json a run counts as done.
    """
    try:
        status = _json(folder / "status.json") if (folder / "status.json").exists() else {}
    except ValueError as error:  # cut short, or empty: claimed by a job that died at once
        return Problem(str(folder), "BROKEN", f"status.json cannot be read: {error}")
    state, metrics = status.get("state", "DONE"), folder / "metrics.json"
    if state == "RUNNING":
        since = status.get("start", "a time that is not known")
        return Problem(str(folder), state, f"running since {since}, or killed without notice")
    if state != "DONE":
        return Problem(str(folder), state, status.get("error") or "no reason was recorded")
    if not metrics.exists():
        return None if has_parts else Problem(str(folder), "MISSING", "there is no metrics.json")
    try:
        config = _yaml(folder / "config.yaml")
        run = Run(folder, config, _numbers(metrics), status.get("start", ""))
        run.row(), run.options, run.sizes  # what is odd in them is odd in this run alone
    except FileNotFoundError:
        return Problem(str(folder), "MISSING", "there is no config.yaml")
    except (ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Problem(str(folder), "BROKEN", f"it cannot be read as a run: {reason}")
    return run


def _tables(finished: list[Run], problems: list[Problem]) -> Runs:
    import pandas as pd

    runs = pd.DataFrame([run.row() for run in finished])
    if runs.empty:
        return Runs(runs, runs, problems)
    options = pd.Series([run.options for run in finished], dtype=object)
    # A method has one name in all scripts; settings are told apart within a table.
    said = pd.Series("", runs.index)
    for _, own in runs.groupby(["task", "method"]):
        said[own.index] = method_labels(list(options[own.index]))
    runs["setting"] = ""
    for _, table in runs.groupby(["task", "verb", "mode"]):
        labels = setting_labels(
            list(options[table.index]), list(table["method"]), list(said[table.index])
        )
        runs.loc[table.index, "setting"] = labels
    runs["method"] = (runs["method"] + " " + said).str.strip()
    numbers = pd.DataFrame([run.metrics | run.sizes for run in finished])
    runs = pd.concat([runs[["run", *CELL, *UNIT, "started"]], numbers], axis=1)
    for name in ("weight_bits", "activation_bits", "seed", "split"):
        runs[name] = runs[name].astype("Int64")

    # Of runs that agree in all that could tell them apart, the last one stands.
    runs["number"] = range(len(runs))
    runs = runs.sort_values("started", kind="stable")
    is_repeated = runs.duplicated([*CELL, *UNIT], keep="last")
    reason = "a later run has the same configuration; that one counts"
    repeated = [Problem(name, "REPEATED", reason) for name in runs["run"][is_repeated]]
    runs = runs[~is_repeated].sort_values([*CELL, *UNIT], ignore_index=True)
    scores = pd.DataFrame(
        [
            (row, numeric, metric, value)
            for row, number in enumerate(runs.pop("number"))
            for numeric, metric, value in finished[number].scores()
        ],
        columns=["row", "numeric", "metric", "value"],
    )
    scores = scores.join(runs[[*CELL, *UNIT]], on="row").drop(columns="row")
    return Runs(runs, scores, [*problems, *repeated])


@cache
def _yaml(path: Path) -> dict[str, Any]:
    content = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no mapping")
    return content


def _numbers(path: Path) -> dict[str, float]:
    content = _json(path)
    for name, value in content.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, which is no finite number")
    return content


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no object")
    return content
