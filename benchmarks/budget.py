"""Compare budgets of bits with uniform widths: python benchmarks/budget.py --tasks digits

For each task, method and seed, a network is trained, then quantized at each of `--widths`
uniformly (`4,2`: 4 bits for mu and 2 for sigma), and with each of `--means` as
`quant.budget.mean_bits`. The results are rows of a CSV file. The same command resumes an
interrupted comparison.

    python benchmarks/budget.py --methods bbb pointwise --seeds 0 1 2 3 4 --modes ptq qat
"""

import argparse
import csv
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from bqnn.commands import main as run
from bqnn.files import write_csv
from bqnn.text import valid_name

KEY = ("task", "method", "seed", "mode", "bits", "measure")
COLUMNS = {name: f"int8/test/{name}" for name in ("error", "nll", "mi", "ece")}
QUIET = ("logger=none", "plots=false", "trainer.progress_bar=false", "trainer.threads=1")


def main() -> None:
    given = _arguments()
    made: dict[tuple[str, ...], dict[str, Any]] = {}
    if given.results.exists():
        with given.results.open(newline="") as file:
            made = {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}
    for task, seed, method in product(given.tasks, given.seeds, given.methods):
        network = given.out / f"{task}_{method}_s{seed}"
        chosen = [f"task={task}", f"method={method}", f"seed={seed}", *given.train]
        _run("train", network / "float", chosen)
        for mode, (bits, measure, options) in product(given.modes, _forms(given)):
            folder = network / valid_name(f"{mode}_{bits}_{measure}")
            source = f"checkpoint={network}/float/checkpoint.ckpt"
            _run("quantize", folder, [source, f"quant.mode={mode}", *options, *given.quantize])
            row = {"task": task, "method": method, "seed": seed, "mode": mode}
            row |= {"bits": bits, "measure": measure, **_results(folder)}
            made[tuple(str(row[name]) for name in KEY)] = row
            given.results.parent.mkdir(parents=True, exist_ok=True)
            write_csv(given.results, [made[key] for key in sorted(made)])


def _forms(given: argparse.Namespace) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the bits, the measure (or `uniform`) and the options of each quantization."""
    for width in given.widths:
        bits, _, sigma = width.partition(",")
        options = [f"quant.weight_bits={bits}", *([f"quant.sigma_bits={sigma}"] if sigma else [])]
        yield f"{(int(bits) + int(sigma or bits)) / 2:g}", f"uniform {width}", options
    for bits, measure in product(given.means, given.measures):
        options = [f"quant.budget.mean_bits={bits}", f"quant.budget.measure={measure}"]
        yield f"{bits:g}", measure, options


def _run(verb: str, folder: Path, arguments: list[str]) -> None:
    try:
        run(verb, [*QUIET, *arguments, "resume=true", f"hydra.run.dir={folder}"])
    except SystemExit as stop:
        if stop.code:
            raise


def _results(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "metrics.json").read_text())
    size = json.loads((folder / "size.json").read_text())
    floats = {f"float_{name}": found[f"float/test/{name}"] for name in ("nll", "mi")}
    return {
        **{name: f"{found[key]:.6g}" for name, key in COLUMNS.items()},
        **{name: f"{value:.6g}" for name, value in floats.items()},
        "bytes": size["packed_bytes"],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["digits"])
    parser.add_argument("--methods", nargs="+", default=["bbb", "pointwise"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--modes", nargs="+", choices=("ptq", "qat"), default=["ptq", "qat"])
    parser.add_argument("--widths", nargs="*", default=["3"])
    parser.add_argument("--means", nargs="*", type=float, default=[3.0])
    parser.add_argument("--measures", nargs="+", default=["nll"])
    parser.add_argument("--train", nargs="*", default=[], help="more options of train")
    parser.add_argument("--quantize", nargs="*", default=[], help="more options of quantize")
    parser.add_argument("--out", type=Path, default=Path("outputs/budgets"), help="of the runs")
    parser.add_argument("--results", type=Path, default=Path("docs/results/budget.csv"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
