"""Train, quantize and evaluate methods on tasks: python benchmarks/comparison.py --tasks digits

A cell is a method on a task with a seed (and a split). It runs `bqnn train`, `bqnn quantize` for
each of `--forms`, and `bqnn evaluate` for each network, in one process. The results are rows of a
CSV file, which is written after each cell and keeps the rows of other cells. The same command
resumes an interrupted comparison. A cell that fails does not stop the others. The lengths of
trainings and the numbers of networks are in comparison.yaml, other settings in conf/tuned.

    python benchmarks/comparison.py --tasks digits --seeds 0 1 2 --forms qat:4,7
    python benchmarks/comparison.py --tasks yacht --splits 20 --results docs/results/tables.csv
    python benchmarks/comparison.py --tasks mnist --processes 16 --train trainer.accelerator=gpu
"""

import argparse
import csv
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bqnn.files import written_beside
from bqnn.jobs.status import read_status

METHODS = ("ensemble", "bbb", "sghmc", "laplace", "swag", "mcdropout", "pointwise")  # slowest first
SETTINGS = Path(__file__).with_suffix(".yaml")
KEY = ("task", "split", "method", "seed", "form", "weight_bits", "activation_bits")
# The other data of each task; AUROC says how well uncertainty tells it from the test rows.
OTHER = {"mnist": "fashion_mnist", "fashion_mnist": "mnist", "digits": "uniform"}
OTHER_ROWS = "out_of_range"  # of tables
# Columns of the CSV file and the metrics of evaluate.py that they hold.
CLASSES = {
    **{name: f"test/{name}" for name in ("error", "nll", "brier", "ece", "mi", "ape")},
    "auroc": "ood/{other}/auroc_entropy",
    **{f"calibrated_{name}": f"calibrated/test/{name}" for name in ("nll", "ece")},
    "temperature": "calibration/temperature",
    **{
        f"{kind}_{score}": f"test/{kind}_{score}"
        for score in ("lac", "aps", "raps")
        for kind in ("coverage", "worst_class_coverage", "size")
    },
}
VALUES = {
    **{name: f"test/{name}" for name in ("rmse", "nll", "nll_mixture", "crps", "coverage95")},
    **{name: f"test/{name}" for name in ("std", "epistemic_std")},
    "auroc": "ood/{other}/auroc_std",
    **{f"calibrated_{name}": f"calibrated/test/{name}" for name in ("nll", "crps")},
    "factor": "calibration/factor",
    **{
        f"{kind}_{score}": f"test/{kind}_{score}"
        for score in ("normalized", "cqr")
        for kind in ("coverage", "width")
    },
}
INTERRUPTED = 130  # the exit code of a verb
VERBS = ("train", "quantize", "evaluate")
QUIET = ("logger=none", "plots=false", "trainer.progress_bar=false", "resume=true")


class Form(NamedTuple):
    """A form of a trained network: float, or quantized by `qat` or `ptq`."""

    mode: str
    weight_bits: int | None = None
    activation_bits: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Form":
        """Read a form such as qat:4,7."""
        mode, _, bits = text.partition(":")
        try:
            weights, activations = map(int, bits.split(","))
        except ValueError:
            weights = activations = 0
        if mode not in ("qat", "ptq") or not (2 <= weights <= 8 and 2 <= activations <= 8):
            raise argparse.ArgumentTypeError(
                f"{text}: write it as qat:4,7 or ptq:2,7, with 2 to 8 bits"
            )
        return cls(mode, weights, activations)

    def __str__(self) -> str:
        return self.mode if self.weight_bits is None else f"{self.mode}_w{self[1]}a{self[2]}"


FLOAT = Form("float")


@dataclass(frozen=True)
class Cell:
    """A method on a task with a seed, and with a split if the task has splits."""

    method: str
    task: str
    seed: int
    split: int | None = None

    def __str__(self) -> str:
        split = "" if self.split is None else f"_k{self.split}"
        return f"{self.task}{split}_{self.method}_s{self.seed}"


@dataclass(frozen=True)
class Plan:
    """What happens to each cell.

    Args:
        out: The folder of all cells.
        forms: The quantized forms.
        alpha: The share of targets that prediction sets may miss.
        settings: Arguments of each verb (train, quantize, evaluate) by task and method, where the
            method `all` is for all methods.
        options: Further arguments of each verb.
    """

    out: Path
    forms: Sequence[Form]
    alpha: float
    settings: Mapping[str, Mapping[str, Mapping[str, Sequence[str]]]]
    options: Mapping[str, Sequence[str]]

    def commands(self, cell: Cell) -> Iterator[tuple[str, Path, Path | None, list[str]]]:
        """Yield the runs of a cell in their order.

        Yields:
            The verb, the folder, the folder of the network that the verb reads, and the arguments.
        """
        folder = self.out / str(cell)
        split = [] if cell.split is None else [f"task.split={cell.split}"]
        chosen = [f"method={cell.method}", f"task={cell.task}", f"seed={cell.seed}", *split]
        yield "train", folder / "float", None, chosen
        for form in self.forms:
            bits = [f"quant.weight_bits={form[1]}", f"quant.activation_bits={form[2]}"]
            arguments = [f"quant.mode={form.mode}", *bits]
            yield "quantize", folder / str(form), folder / "float", arguments
        judged = ["calibrate=temperature", f"conformal={self.alpha}"]
        sets = ["suite=ood", f"suite.ood=[{OTHER.get(cell.task, OTHER_ROWS)}]"]
        for form in (FLOAT, *self.forms):
            numeric = [] if form == FLOAT else ["numeric=int8"]
            source = folder / str(form)
            yield "evaluate", folder / f"{form}_evaluated", source, [*numeric, *judged, *sets]

    def run(self, cell: Cell) -> str | None:
        """Run what is missing of a cell, and return the first failure.

        What reads the network of a failed run is left out.
        """
        failures = []
        for verb, folder, source, arguments in self.commands(cell):
            if source is not None and not _is_done(source):
                continue
            read = [] if source is None else [f"checkpoint={source}"]
            where = f"hydra.run.dir={folder}"
            try:
                _run(verb, [*read, *arguments, *self.more(verb, cell), where])
            except SystemExit as stop:
                if stop.code == INTERRUPTED:
                    raise
                status = read_status(folder)
                reason = None if status is None else status.error
                failures.append(f"{verb} {folder}: {reason or 'refused, see the output above'}")
        return failures[0] if failures else None

    def more(self, verb: str, cell: Cell) -> list[str]:
        """Return the arguments of a verb that do not depend on the form."""
        of_task = self.settings.get(cell.task, {})
        set_up = [of_task.get(name, {}).get(verb, []) for name in ("all", cell.method)]
        return [*QUIET, *chain(*set_up), *self.options[verb]]

    def rows(self, cell: Cell) -> Iterator[dict[str, Any]]:
        """Yield the results of a cell, a row per form; forms without results are left out.

        A float network that is not evaluated yet has the metrics of its training.
        """
        folder = self.out / str(cell)
        sizes = [_read(folder / str(form) / "size.json") for form in self.forms]
        float_bytes = next((size["float_bytes"] for size in sizes if size), None)
        hardware = _read(folder / "float" / "status.json").get("gpu") or "CPU"
        for form in (FLOAT, *self.forms):
            network, evaluated = folder / str(form), folder / f"{form}_evaluated"
            if form == FLOAT and not _is_done(evaluated):
                evaluated = network
            if not all(map(_is_done, (folder / "float", network, evaluated))):
                continue
            place = (cell.task, cell.split, cell.method, cell.seed, *form)
            found, made = _read(evaluated / "metrics.json"), _read(network / "metrics.json")
            yield {
                **dict(zip(KEY, place, strict=True)),
                "draws": int(found["num_samples"]),
                "test_share": found.get("test_share"),
                **_columns(cell.task, form, found),
                "training_seconds": _rounded(made.get("time/training_seconds", 0.0)),
                "bytes": _read(network / "size.json").get("packed_bytes", float_bytes),
                "hardware": hardware,
            }


def main() -> None:
    options = _arguments()
    splits = [None] if options.splits is None else list(range(options.splits))
    chosen = [method for method in METHODS if method in options.methods]
    cells = [
        Cell(method, task, seed, split)
        for split, method, task, seed in product(splits, chosen, options.tasks, options.seeds)
    ]
    threads = ["trainer.threads=1"] if options.processes > 1 else []
    more = {verb: [*threads, *getattr(options, verb)] for verb in VERBS}
    settings = yaml.safe_load(SETTINGS.read_text())
    plan = Plan(options.out, options.forms, options.alpha, settings, more)
    plan.out.mkdir(parents=True, exist_ok=True)
    failures, started = {}, time.monotonic()
    done = ((cell, None) for cell in cells) if options.collect else None
    for number, (cell, failure) in enumerate(
        done or _results(plan, cells, options.processes), start=1
    ):
        if failure is not None:
            failures[cell] = failure
        write_rows(options.results, plan.rows(cell))
        seconds = time.monotonic() - started
        print(f"{number}/{len(cells)} {cell}: {failure or 'done'}, {seconds:.0f} s", flush=True)
    for cell, failure in failures.items():
        print(f"failed: {cell}: {failure}", file=sys.stderr)
    print(f"{len(cells) - len(failures)} of {len(cells)} cells done; rows in {options.results}")
    sys.exit(bool(failures))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to a CSV file; those with an equal key replace earlier ones, the others stay."""
    kept: dict[tuple[str, ...], dict[str, str]] = {}
    earlier: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            earlier = list(csv.DictReader(file))
    written = [{name: "" if v is None else str(v) for name, v in row.items()} for row in rows]
    for row in (*earlier, *written):
        kept[tuple(row[name] for name in KEY)] = row
    if not kept:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for row in kept.values() for name in row)
    with written_beside(path) as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted(kept.items(), key=_order))


def _order(item: tuple[tuple[str, ...], object]) -> tuple[tuple[int, str], ...]:
    """Sort numbers by value: all are whole and short, so by their length first."""
    return tuple((len(part) if part.isdigit() else 0, part) for part in item[0])


def _results(
    plan: Plan, cells: Sequence[Cell], processes: int
) -> Iterator[tuple[Cell, str | None]]:
    """Run the cells, and yield each with its failure as it ends."""
    if processes == 1:
        yield from ((cell, plan.run(cell)) for cell in cells)
        return
    context = multiprocessing.get_context("spawn")  # a fork cannot use the GPU
    with ProcessPoolExecutor(processes, context, _start, (plan.out,)) as pool:
        futures = {pool.submit(plan.run, cell): cell for cell in cells}
        for future in as_completed(futures):
            error = future.exception()
            failure = future.result() if error is None else f"{type(error).__name__}: {error}"
            yield futures[future], failure


def _start(out: Path) -> None:
    """Send the output of a process to a file of its own."""
    file = os.open(out / f"process_{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)


def _run(verb: str, arguments: list[str]) -> None:
    from bqnn.commands import main as run

    run(verb, arguments)


def _columns(task: str, form: Form, found: Mapping[str, float]) -> dict[str, float | None]:
    """Return the columns of a row, from the metrics of an evaluation; None for one that lacks."""
    prefix = "" if form == FLOAT else "int8/"
    other = OTHER.get(task, OTHER_ROWS)
    columns = CLASSES if f"{prefix}test/error" in found else VALUES
    return {n: _rounded(found.get(prefix + key.format(other=other))) for n, key in columns.items()}


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _is_done(folder: Path) -> bool:
    status = read_status(folder)
    return status is not None and status.state == "DONE"


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number, 1 or more")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text}: a share of targets, above 0 and below 1")
    return share


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["digits"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--splits", type=_count, help="the number of splits, from 0, of UCI tables")
    parser.add_argument("--forms", nargs="*", type=Form.parse, default=[Form("qat", 4, 7)])
    parser.add_argument("--alpha", type=_share, default=0.1, help="of prediction sets")
    parser.add_argument("--processes", type=_count, default=1)
    parser.add_argument("--collect", action="store_true", help="only write rows of what is done")
    parser.add_argument("--out", type=Path, default=Path("outputs/comparison"), help="of the runs")
    parser.add_argument("--results", type=Path, default=Path("docs/results/images.csv"))
    for verb in VERBS:
        parser.add_argument(f"--{verb}", nargs="*", default=[], help=f"more options of {verb}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
