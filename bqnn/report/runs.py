"""Runs found on disk, as tables; and what was found that could not become a row."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bqnn.jobs.records import instant, read_record
from bqnn.report.settings import flatten, method_labels, setting_labels
from bqnn.text import one_line, printable, short

if TYPE_CHECKING:
    from pandas import DataFrame

FILES = ("metrics.json", "config.yaml", "status.json")
LARGEST = 1e150  # of a number: a standard deviation needs its square
STAGES = ("float", "unquantized", "simulated", "int8")

UNIT = ["seed", "split"]  # what runs are repeated over
CELL = ["task", "verb", "mode", "method", "setting", "weight_bits", "activation_bits"]
COLUMNS = ("run", *CELL, *UNIT, "started", "number")  # of a run; no metric has such a name


@dataclass
class Run:
    """A finished job: its folder, configuration and metrics, and when it started.

    The files may be anybody's: whatever is read of them is checked, and what is odd is a
    ValueError.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, float]
    started: datetime | None

    @property
    def verb(self) -> str:
        """The script that ran."""
        if "checkpoint" not in self.config:
            return "train"
        return "evaluate" if "numeric" in self.config else "quantize"

    @cached_property
    def options(self) -> dict[str, str]:
        """All that may have made its numbers what they are, flat: see `bqnn.report.settings`."""
        training: dict[str, Any] = {"trainer": _group(self.source, "trainer")}
        if "fine_tuning" in _group(self.source, "quant"):  # what is evaluated was quantized
            training["fine_tuning"] = self.source["quant"]["fine_tuning"]
        flat = flatten(self.config) | flatten(training, "trained.")
        if "checkpoint" in flat:
            flat["trained.seed"] = "own" if self.fine_tuning_seed is None else flat["seed"]
            if type(self.config["checkpoint"]) is not str:
                raise ValueError(
                    f"config.yaml: checkpoint is {flat['checkpoint']}, which is no path"
                )
            flat["checkpoint"] = printable(Path(self.config["checkpoint"]).name)
        if flat["quant.name"] == "checkpoint" and self.source:
            flat["quant.name"] = _name(self.source, "quant")
        if flat.get("method.init_from", "None") != "None":
            flat["method.init_from"] = "checkpoint"
        return flat

    @cached_property
    def source(self) -> dict[str, Any]:
        """The configuration of the run whose checkpoint was given, where that is still there."""
        checkpoint = self.config.get("checkpoint")
        if type(checkpoint) is not str:
            return {}
        # The path may start from where the job was, which is often above the folder that it left.
        given = Path(checkpoint).parent / "config.yaml"
        for path in (given, *(parent / given for parent in self.folder.absolute().parents)):
            try:
                config = _config(path)
            except (OSError, ValueError):
                continue
            return config if "name" in _group(config, "quant") else {}
        return {}

    @property
    def fine_tuning_seed(self) -> int | None:
        """Of its own fine-tuning, or of that of the network it evaluates; of calibrations none."""
        if _group(self.config, "quant").get("mode") != "qat":
            return None
        for config in (self.config, self.source):
            tuning = _group(_group(config, "quant"), "fine_tuning")
            if tuning.get("seed") is not None:
                return _whole(tuning, "seed")
        return None

    def row(self) -> dict[str, Any]:
        """What tells the run apart; bits are None for a float one, a split where there is none.

        The seed is that of the fine-tuning where it has one of its own.
        """
        tuned = self.fine_tuning_seed
        quant, task = _group(self.config, "quant"), _group(self.config, "task")
        is_float = _name(self.config, "quant") == "none"
        own = _whole(self.config, "seed")
        return {
            "run": printable(str(self.folder)),
            # In UTC and of one length, so that texts sort as the instants do.
            "started": "" if self.started is None else self.started.isoformat(" ", "microseconds"),
            "task": _name(self.config, "task"),
            "verb": self.verb,
            "mode": "float" if is_float else _text(quant, "mode"),
            "method": _name(self.config, "method"),
            "weight_bits": None if is_float else _whole(quant, "weight_bits"),
            "activation_bits": None if is_float else _whole(quant, "activation_bits"),
            "seed": own if tuned is None else tuned,
            "split": None if task.get("split") is None else _whole(task, "split"),
        }

    @cached_property
    def sizes(self) -> dict[str, float]:
        """The bytes of its parameters, where it has quantized them."""
        path = self.folder / "size.json"
        found = _numbers(path) if path.exists() else {}
        return {f"size/{name}": count for name, count in found.items()}

    def scores(self) -> Iterator[tuple[str, str, float]]:
        """(numeric, metric, value) of what was evaluated: ("int8", "test/nll", 0.03)."""
        default = "float" if self.config["quant"]["name"] == "none" else "simulated"
        for key, value in self.metrics.items():
            head, _, rest = key.partition("/")
            if head in STAGES and rest:
                yield head, rest, value
            elif rest and head != "time":
                yield default, key, value

    def require_one_value(self) -> None:
        """ValueError where two names stand for one number, as test/nll and float/test/nll may."""
        seen = set()
        for numeric, metric, _ in self.scores():
            if (numeric, metric) in seen:
                raise ValueError(f"metrics.json has {short(f'{numeric}/{metric}')} in two ways")
            seen.add((numeric, metric))


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
    found, problems = find(folders)
    parents = {parent for folder in found for parent in folder.parents}
    finished = []
    for folder in found:
        run = read(folder, has_parts=folder in parents)
        if isinstance(run, Run):
            finished.append(run)
        elif run is not None:
            problems.append(run)
    return _tables(finished, problems)


def find(folders: Iterable[Path]) -> tuple[list[Path], list[Problem]]:
    """Every folder with one of a run's files, but for those that W&B keeps below a run.

    Folders that cannot be listed are problems.
    """
    found, problems = set(), []

    def unlisted(error: OSError) -> None:
        problems.append(_broken(Path(error.filename), error.strerror or str(error)))

    for top in folders:
        if not top.is_dir():
            raise FileNotFoundError(
                f"{printable(str(top))}: no such folder; give folders with runs in them"
            )
        for name, below, files in os.walk(top, onerror=unlisted):
            below[:] = [each for each in below if each != "wandb"]
            if not {*files}.isdisjoint(FILES):
                found.add(Path(name))
    return sorted(found), problems


def read(folder: Path, has_parts: bool) -> Run | Problem | None:
    """The run in a folder, or why there is none.

    None: the folder only holds those of its parts, or a command line that never became a job.
    metrics.json and config.yaml are enough: without status.json a run counts as done.
    """
    try:
        status = read_record(folder / "status.json")
    except FileNotFoundError:
        status = {}
    except ValueError as error:  # cut short, or empty: claimed by a job that died at once
        return _broken(folder, str(error))
    state, metrics = status.get("state", "DONE"), folder / "metrics.json"
    if state == "RUNNING":
        since = status.get("start")
        known = one_line(since)[:40] if type(since) is str else "a time that is not known"
        return _problem(folder, state, f"running since {known}, or killed without notice")
    if state in ("FAILED", "INTERRUPTED"):
        if not (folder / "config.yaml").exists():
            return None
        reason = status.get("error")
        return _problem(folder, state, reason if type(reason) is str else "no reason was recorded")
    if state != "DONE":
        return _broken(folder, f"status.json has the state {short(state)}")
    if not metrics.exists():
        return None if has_parts else _problem(folder, "MISSING", "there is no metrics.json")
    try:
        config = _config(folder / "config.yaml")
        run = Run(folder, config, _numbers(metrics), instant(status.get("start")))
        run.row(), run.options, run.sizes  # what is odd in them is odd in this run alone
        run.require_one_value()
    except FileNotFoundError:
        return _problem(folder, "MISSING", "there is no config.yaml")
    except ValueError as error:
        return _broken(folder, str(error))
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


def _problem(folder: Path, state: str, reason: str) -> Problem:
    return Problem(printable(str(folder)), state, one_line(reason))


def _broken(folder: Path, reason: str) -> Problem:
    return _problem(folder, "BROKEN", f"it cannot be read as a run: {reason}")


@cache
def _config(path: Path) -> dict[str, Any]:
    return read_record(path)


def _numbers(path: Path) -> dict[str, float]:
    """Numbers by their names, which have to be fit for a column; their squares are finite, too."""
    content = read_record(path)
    for name, value in content.items():
        if not name.isprintable() or len(name) > 200 or name in COLUMNS:
            raise ValueError(f"{path.name} has a number called {short(name)}")
        is_number = type(value) is float or (type(value) is int and abs(value) < 2**63)
        if not is_number or not math.isfinite(value):
            raise ValueError(f"{path.name}: {name} is {short(value)}, which is no finite number")
        if abs(value) > LARGEST:
            raise ValueError(f"{path.name}: {name} is {short(value)}, too large for statistics")
    return content


def _group(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A group of a configuration, empty where there is none."""
    group = config.get(key)
    return group if isinstance(group, dict) else {}


def _name(config: Mapping[str, Any], key: str) -> str:
    return _text(_group(config, key), "name", f"{key}.name")


def _text(group: Mapping[str, Any], key: str, name: str | None = None) -> str:
    value = group.get(key)
    if type(value) is not str or not 0 < len(value) <= 200:
        raise ValueError(f"config.yaml: {name or key} is {short(value)}, which is no name")
    return printable(value)


def _whole(group: Mapping[str, Any], key: str) -> int:
    value = group.get(key)
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"config.yaml: {key} is {short(value)}, which is no whole number")
    return value
