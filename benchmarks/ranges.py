"""Compare ranges and roundings of quantized networks, one row each in a CSV file.

    python benchmarks/ranges.py calibrate outputs/digits/*/checkpoint.ckpt --bits 4,7 3,7 2,7
    python benchmarks/ranges.py collect outputs/digits_qat/*/*

`calibrate` quantizes float classifiers with every combination of `quant.weight_observer`,
`quant.weight_rounding` and `quant.bias_correction`, and predicts rows in int8. Rows that the CSV
file has already are not computed again. `collect` reads the folders of quantize.py: its validation
metrics of the last epoch, and the test metrics in int8.
"""

import argparse
import csv
import json
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bqnn.checkpoints.recipe import load
from bqnn.data import TensorData
from bqnn.data.task import make_data
from bqnn.evaluation.suite import EvaluationSet, predict_sets, split_sets
from bqnn.files import written_beside
from bqnn.inference.predictions import Prediction, score
from bqnn.methods import Method
from bqnn.quant.callback import calibrate_module
from bqnn.quant.integer import convert
from bqnn.quant.spec import ENGINES, QuantSpec

OPTIONS = ("weight_observer", "activation_observer", "weight_rounding", "bias_correction")
QUANT = ("mode", "weight_bits", "activation_bits", *OPTIONS)
KEY = ("task", "method", "seed", "split", "rows", *QUANT)
METRICS = ("error", "nll", "mi")

Row = dict[str, Any]
Rows = dict[tuple[str, ...], Row]


def main() -> None:
    options = _arguments()
    found = read_rows(options.results)
    if options.verb == "collect":
        for folder in options.folders:
            for row in collected(folder):
                found[key(row)] = row
    else:
        torch.set_num_threads(1)
        for path in options.checkpoints:
            for row in calibrated(path, options, found):
                found[key(row)] = row
                write_rows(options.results, found)
                print(row, flush=True)
    write_rows(options.results, found)


def calibrated(path: Path, options: argparse.Namespace, found: Rows) -> Iterator[Row]:
    """Yield the rows of a checkpoint that are not found yet: float, and each calibration."""
    model = load(path)
    assert model.recipe is not None
    recipe = model.recipe
    task = recipe["task"] | dict(each.split("=", 1) for each in options.task)
    config = {"task": task, "data_dir": str(options.data_dir), "seed": recipe["seed"]}
    data = make_data(config, recipe)
    rows = split_sets(data, [options.split])[options.split]
    assert rows.targets is not None
    rows = EvaluationSet(rows.inputs[: options.rows], rows.targets[: options.rows])
    place = {"task": task["name"], "method": recipe["method"]["name"], "seed": recipe["seed"]}
    place |= {"split": options.split, "rows": len(rows.inputs)}
    expected = predicted(model, data, rows)
    yield {**place, **dict.fromkeys(QUANT, ""), **metrics(expected, expected)}
    for chosen in combinations(options):
        row = {**place, "mode": "ptq", **chosen}
        if key(row) in found:
            continue
        quantized = deepcopy(model)
        started = time.process_time()
        calibrate_module(
            quantized, QuantSpec(engine=options.engine, **chosen), data, options.batches
        )
        seconds = time.process_time() - started
        quantized.net = convert(quantized.net)
        values = metrics(predicted(quantized, data, rows), expected)
        yield {**row, **values, "calibration_seconds": round(seconds, 1)}


def combinations(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the bit widths and options of each calibration."""
    choices = (options.bits, options.observers, options.rounding, options.correction)
    for bits, observer, rounding, corrects in product(*choices):
        weight_bits, activation_bits = map(int, bits.split(","))
        yield {
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "weight_observer": observer,
            "activation_observer": "histogram",
            "weight_rounding": rounding,
            "bias_correction": corrects == "true",
        }


def collected(folder: Path) -> Iterator[Row]:
    """Yield the validation row and the test row of a finished run of quantize.py."""
    if not (folder / "metrics.json").exists():
        return
    config = yaml.safe_load((folder / "config.yaml").read_text())
    quant = QuantSpec.from_config(config["quant"])
    place = {"task": config["task"]["name"], "method": config["method"]["name"]}
    place |= {"seed": config["seed"], "rows": "", "mode": config["quant"]["mode"]}
    place |= {name: getattr(quant, name) for name in QUANT[1:]}
    with (folder / "metrics.csv").open(newline="") as file:
        last = [row for row in csv.DictReader(file) if row["val/nll"]][-1]
    tested = json.loads((folder / "metrics.json").read_text())
    for split, values, prefix in (("val", last, "val"), ("test", tested, "int8/test")):
        yield {**place, "split": split, **{n: _short(values[f"{prefix}/{n}"]) for n in METRICS}}


def predicted(model: Method, data: TensorData, rows: EvaluationSet) -> Prediction:
    return predict_sets(model.eval(), {"rows": rows}, data.normalize)["rows"]


def metrics(prediction: Prediction, expected: Prediction) -> dict[str, float]:
    """Return metrics, and the mean divergence from the probabilities of the float network."""
    own, other = (_log_probabilities(each.samples) for each in (prediction, expected))
    found = score(prediction)
    divergence = (other.exp() * (other - own)).sum(-1).mean()
    return {n: _short(found[n]) for n in METRICS} | {"kl": _short(divergence)}


def _log_probabilities(samples: Tensor) -> Tensor:
    return samples.double().softmax(-1).mean(0).clamp_min(1e-30).log()


def _short(value: Any) -> float:
    return float(f"{float(value):.6g}")


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def read_rows(path: Path) -> Rows:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {key(row): row for row in csv.DictReader(file)}


def write_rows(path: Path, found: Rows) -> None:
    names = (*KEY, *METRICS, "kl", "calibration_seconds")
    with written_beside(path) as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted(found.items()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    collect, calibrate = verbs.add_parser("collect"), verbs.add_parser("calibrate")
    collect.add_argument("folders", nargs="+", type=Path)
    calibrate.add_argument("checkpoints", nargs="+", type=Path)
    calibrate.add_argument("--bits", nargs="+", default=["4,7", "3,7", "2,7", "8,4"])
    calibrate.add_argument("--observers", nargs="+", default=["minmax", "least_squares"])
    calibrate.add_argument("--rounding", nargs="+", default=["nearest", "adaptive"])
    calibrate.add_argument("--correction", nargs="+", default=["false", "true"])
    calibrate.add_argument("--split", choices=("val", "test"), default="val")
    calibrate.add_argument("--rows", type=int, help="the first rows of the split; default: all")
    calibrate.add_argument("--batches", type=int, default=32, help="of training rows")
    calibrate.add_argument("--task", nargs="*", default=[], help="its options: source=folder")
    calibrate.add_argument("--data-dir", type=Path, default=Path("data"))
    calibrate.add_argument("--engine", choices=ENGINES, default="fbgemm")
    for verb in (collect, calibrate):
        verb.add_argument("--results", type=Path, default=Path("docs/results/ranges.csv"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
