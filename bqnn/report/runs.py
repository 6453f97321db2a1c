"""Find runs on disk and read them into tables, and list those that cannot be read."""

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
LARGEST = 1e150  # the largest number that is read; a standard deviation needs its square
STAGES = ("float", "finetuned", "unquantized", "simulated", "int8")

UNIT = ["seed", "split"]  # columns over which runs are repeated
CELL = ["task", "verb", "mode", "method", "setting", "weight_bits", "activation_bits"]
COLUMNS = ("run", *CELL, *UNIT, "started", "number")  # names that no metric may have


@dataclass
class Run:
    """The record of a finished job, whose files may come from an untrusted source.

    All properties and methods check what they read, and raise a ValueError for invalid content.

    Attributes:
        folder: The folder of the run.
        config: Its config.yaml.
        metrics: Its metrics.json.
        started: The start of the job, or None if it is unknown.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, float]
    started: datetime | None

    @property
    def verb(self) -> str:
        """The script of the run: train, quantize or evaluate."""
        if "checkpoint" not in self.config:
            return "train"
        return "evaluate" if "numeric" in self.config else "quantize"

    @cached_property
    def options(self) -> dict[str, str]:
        """All options that can affect the numbers, flat, as in `bqnn.report.settings`."""
        training: dict[str, Any] = {"trainer": _group(self.source, "trainer")}
        if "fine_tuning" in _group(self.source, "quant"):  # it evaluates a quantized network
            training["fine_tuning"] = self.source["quant"]["fine_tuning"]
        flat = flatten(self.config) | flatten(training, "trained.")
        if "checkpoint" in flat:
            flat["trained.seed"] = "own" if self.fine_tuning_seed is None else flat["seed"]
            if type(self.config["checkpoint"]) is not str:
                raise ValueError(
                    f"config.yaml: checkpoint is {flat['checkpoint']}, which is not a path"
                )
            flat["checkpoint"] = printable(Path(self.config["checkpoint"]).name)
        if flat["quant.name"] == "checkpoint" and self.source:
            flat["quant.name"] = _name(self.source, "quant")
        if flat.get("method.init_from", "None") != "None":
            flat["method.init_from"] = "checkpoint"
        return flat

    @cached_property
    def source(self) -> dict[str, Any]:
        """The configuration of the run that made the checkpoint, or empty if it is gone."""
        checkpoint = self.config.get("checkpoint")
        if type(checkpoint) is not str:
            return {}
        # The path can be relative to the job's working directory, often a parent of the folder.
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
        """The seed of the fine-tuning of its network, or None without one."""
        if _group(self.config, "quant").get("mode") != "qat":
            return None
        for config in (self.config, self.source):
            tuning = _group(_group(config, "quant"), "fine_tuning")
            if tuning.get("seed") is not None:
                return _whole(tuning, "seed")
        return None

    def row(self) -> dict[str, Any]:
        """Return the columns that identify the run.

        The bits are None for a float network and if a budget chooses them, and the split is None
        without one. The seed is that of the fine-tuning if it has its own.
        """
        tuned = self.fine_tuning_seed
        quant, task = _group(self.config, "quant"), _group(self.config, "task")
        is_float = _name(self.config, "quant") == "none"
        budget = {name for name, limit in _group(quant, "budget").items() if limit is not None}
        has_bits = not is_float and not budget & {"bytes", "mean_bits"}
        has_activation_bits = not is_float and "mean_activation_bits" not in budget
        own = _whole(self.config, "seed")
        return {
            "run": printable(str(self.folder)),
            # In UTC and of fixed length, so that strings sort by time.
            "started": "" if self.started is None else self.started.isoformat(" ", "microseconds"),
            "task": _name(self.config, "task"),
            "verb": self.verb,
            "mode": "float" if is_float else _text(quant, "mode"),
            "method": _name(self.config, "method"),
            "weight_bits": _whole(quant, "weight_bits") if has_bits else None,
            "activation_bits": _whole(quant, "activation_bits") if has_activation_bits else None,
            "seed": own if tuned is None else tuned,
            "split": None if task.get("split") is None else _whole(task, "split"),
        }

    @cached_property
    def sizes(self) -> dict[str, float]:
        """The bytes of the parameters, or empty if the run did not quantize them."""
        path = self.folder / "size.json"
        found = _numbers(path) if path.exists() else {}
        return {f"size/{name}": count for name, count in found.items()}

    def scores(self) -> Iterator[tuple[str, str, float]]:
        """Yield (numeric, metric, value) of each metric, such as ("int8", "test/nll", 0.03)."""
        default = "float" if self.config["quant"]["name"] == "none" else "simulated"
        for key, value in self.metrics.items():
            head, _, rest = key.partition("/")
            if head in STAGES and rest:
                yield head, rest, value
            elif rest and head != "time":
                yield default, key, value

    def require_one_value(self) -> None:
        """Refuse two names of one number, such as test/nll and float/test/nll."""
        seen = set()
        for numeric, metric, _ in self.scores():
            if (numeric, metric) in seen:
                raise ValueError(f"metrics.json has {short(f'{numeric}/{metric}')} under two names")
            seen.add((numeric, metric))


@dataclass(frozen=True)
class Problem:
    """A run that a report excludes.

    Attributes:
        run: Its folder, or its settings if it is missing.
        state: FAILED, INTERRUPTED, RUNNING, MISSING, BROKEN, REPEATED or NOT RUN.
        reason: Why it is excluded.
    """

    run: str
    state: str
    reason: str


@dataclass(frozen=True)
class Runs:
    """The data of a report.

    Attributes:
        runs: A row per run, with the columns run, `CELL`, `UNIT`, started, and all metrics and
            sizes.
        scores: A row per run and metric, with the columns numeric, metric, value, CELL, UNIT, and
            test_share, the share of the rows of its data that are test rows.
        problems: The runs that are excluded.
    """

    runs: "DataFrame"
    scores: "DataFrame"
    problems: list[Problem]


def read_runs(folders: Iterable[Path]) -> Runs:
    """Read every run below some folders.

    Args:
        folders: Folders with runs at any depth. Their files may come from an untrusted source.

    Returns:
        The runs, and those that cannot be read.

    Raises:
        FileNotFoundError: A folder does not exist.

    Examples:
        >>> import json, tempfile
        >>> config = {
        ...     "task": {"name": "digits"}, "method": {"name": "bbb"}, "seed": 1,
        ...     "quant": {"name": "none"},
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "config.yaml").write_text(json.dumps(config))
        ...     _ = Path(folder, "metrics.json").write_text('{"test/nll": 0.25}')
        ...     read_runs([Path(folder)]).scores[["method", "seed", "metric", "value"]]
          method  seed    metric  value
        0    bbb     1  test/nll   0.25
    """
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
    """Find every folder with a file of a run, except the folders of Weights & Biases.

    Returns:
        The folders in sorted order, and a problem for each folder that cannot be listed.

    Raises:
        FileNotFoundError: A folder to start from does not exist.
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
    """Read the run in a folder.

    Args:
        folder: The folder. Without status.json, its run counts as DONE.
        has_parts: Whether there are runs below the folder.

    Returns:
        The run, or the problem with it. None if the folder is not a run: it only contains runs, has
        an exported file, or belongs to a command line that failed before its job started.
    """
    try:
        status = read_record(folder / "status.json")
    except FileNotFoundError:
        status = {}
    except ValueError as error:  # truncated, or empty if a job died at once
        return _broken(folder, str(error))
    state, metrics = status.get("state", "DONE"), folder / "metrics.json"
    if state == "RUNNING":
        since = status.get("start")
        known = one_line(since)[:40] if type(since) is str else "an unknown time"
        return _problem(folder, state, f"running since {known}, or killed")
    if state in ("FAILED", "INTERRUPTED"):
        if not (folder / "config.yaml").exists():
            return None
        reason = status.get("error")
        return _problem(folder, state, reason if type(reason) is str else "no reason was recorded")
    if state != "DONE":
        return _broken(folder, f"status.json has the unknown state {short(state)}")
    if not metrics.exists():
        is_export = (folder / "verification.json").exists()
        if has_parts or is_export:
            return None
        return _problem(folder, "MISSING", "there is no metrics.json")
    try:
        config = _config(folder / "config.yaml")
        run = Run(folder, config, _numbers(metrics), instant(status.get("start")))
        run.row(), run.options, run.sizes  # invalid content excludes only this run
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
    # The label of a method is the same for all scripts; settings are labelled within a script.
    known = pd.Series("", runs.index)
    for _, own in runs.groupby(["task", "method"]):
        known[own.index] = method_labels(list(options[own.index]))
    runs["setting"] = ""
    for _, table in runs.groupby(["task", "verb", "mode"]):
        labels = setting_labels(
            list(options[table.index]), list(table["method"]), list(known[table.index])
        )
        runs.loc[table.index, "setting"] = labels
    runs["method"] = (runs["method"] + " " + known).str.strip()
    numbers = pd.DataFrame([run.metrics | run.sizes for run in finished])
    runs = pd.concat([runs[["run", *CELL, *UNIT, "started"]], numbers], axis=1)
    for name in ("weight_bits", "activation_bits", "seed", "split"):
        runs[name] = runs[name].astype("Int64")

    # Of runs with the same configuration, the last one counts.
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
    if "test_share" not in runs:  # of older runs only
        runs["test_share"] = math.nan
    scores = scores.join(runs[[*CELL, *UNIT, "test_share"]], on="row").drop(columns="row")
    return Runs(runs, scores, [*problems, *repeated])


def _problem(folder: Path, state: str, reason: str) -> Problem:
    return Problem(printable(str(folder)), state, one_line(reason))


def _broken(folder: Path, reason: str) -> Problem:
    return _problem(folder, "BROKEN", f"cannot be read as a run: {reason}")


@cache
def _config(path: Path) -> dict[str, Any]:
    return read_record(path)


def _numbers(path: Path) -> dict[str, float]:
    """Read named numbers. Names must be valid columns, and squares must be finite."""
    content = read_record(path)
    for name, value in content.items():
        if not name.isprintable() or len(name) > 200 or name in COLUMNS:
            raise ValueError(f"{path.name} has a number with the invalid name {short(name)}")
        is_number = type(value) is float or (type(value) is int and abs(value) < 2**63)
        if not is_number or not math.isfinite(value):
            raise ValueError(f"{path.name}: {name} is {short(value)}, which is not a finite number")
        if abs(value) > LARGEST:
            raise ValueError(f"{path.name}: {name} is {short(value)}, too large for statistics")
    return content


def _group(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a group of a configuration, or an empty one."""
    group = config.get(key)
    return group if isinstance(group, dict) else {}


def _name(config: Mapping[str, Any], key: str) -> str:
    return _text(_group(config, key), "name", f"{key}.name")


def _text(group: Mapping[str, Any], key: str, name: str | None = None) -> str:
    value = group.get(key)
    if type(value) is not str or not 0 < len(value) <= 200:
        raise ValueError(f"config.yaml: {name or key} is {short(value)}, which is not a name")
    return printable(value)


def _whole(group: Mapping[str, Any], key: str) -> int:
    value = group.get(key)
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"config.yaml: {key} is {short(value)}, which is not a whole number")
    return value
