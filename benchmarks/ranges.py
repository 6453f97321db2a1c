"""Compare ranges and roundings of weights in calibrated networks, one row each in a CSV file.

    python benchmarks/ranges.py outputs/digits/*/checkpoint.ckpt --bits 4,7 3,7 2,7 8,4

Each checkpoint of a float classifier is calibrated with every combination of
`quant.weight_observer`, `quant.weight_rounding` and `quant.bias_correction`, and predicts rows in
int8. Rows that the CSV file has already are not computed again.
"""

import argparse
import csv
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import torch
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

FLOAT = {"weight_bits": "", "activation_bits": ""}
OPTIONS = ("weight_observer", "weight_rounding", "bias_correction")
KEY = ("task", "method", "seed", "split", "rows", "weight_bits", "activation_bits", *OPTIONS)


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    found = read_rows(options.results)
    for path in options.checkpoints:
        model = load(path)
        assert model.recipe is not None
        task = model.recipe["task"] | dict(each.split("=", 1) for each in options.task)
        config = {"task": task, "data_dir": str(options.data_dir), "seed": model.recipe["seed"]}
        data = make_data(config, model.recipe)
        rows = split_sets(data, [options.split])[options.split]
        assert rows.targets is not None
        rows = EvaluationSet(rows.inputs[: options.rows], rows.targets[: options.rows])
        place = {
            "task": task["name"],
            "method": model.recipe["method"]["name"],
            "seed": model.recipe["seed"],
            "split": options.split,
            "rows": len(rows.inputs),
        }
        expected = predicted(model, data, rows)
        add(found, {**place, **FLOAT, **dict.fromkeys(OPTIONS, "")}, metrics(expected, expected))
        for chosen in combinations(options):
            if key({**place, **chosen}) in found:
                continue
            started, quantized = time.process_time(), deepcopy(model)
            spec = QuantSpec(activation_observer="histogram", engine=options.engine, **chosen)
            calibrate_module(quantized, spec, data, options.batches)
            quantized.net = convert(quantized.net)
            seconds = time.process_time() - started
            values = metrics(predicted(quantized, data, rows), expected)
            add(found, {**place, **chosen}, {**values, "calibration_seconds": round(seconds, 1)})
            print({**place, **chosen, **values}, flush=True)
            write_rows(options.results, found)
    write_rows(options.results, found)


def combinations(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the bit widths and options of each calibration."""
    choices = (options.bits, options.observers, options.rounding, options.correction)
    for bits, observer, rounding, corrects in product(*choices):
        weight_bits, activation_bits = map(int, bits.split(","))
        yield {
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "weight_observer": observer,
            "weight_rounding": rounding,
            "bias_correction": corrects == "true",
        }


def predicted(model: Method, data: TensorData, rows: EvaluationSet) -> Prediction:
    return predict_sets(model.eval(), {"rows": rows}, data.normalize)["rows"]


def metrics(prediction: Prediction, expected: Prediction) -> dict[str, float]:
    """Return metrics, and the mean divergence from the probabilities of the float network."""
    own, other = (_log_probabilities(each.samples) for each in (prediction, expected))
    found = score(prediction)
    divergence = (other.exp() * (other - own)).sum(-1).mean()
    values = {name: found[name] for name in ("error", "nll", "mi")} | {"kl": float(divergence)}
    return {name: float(f"{value:.6g}") for name, value in values.items()}


def _log_probabilities(samples: Tensor) -> Tensor:
    return samples.double().softmax(-1).mean(0).clamp_min(1e-30).log()


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def add(
    found: dict[tuple[str, ...], dict[str, Any]], place: dict[str, Any], values: dict[str, Any]
) -> None:
    found[key(place)] = {**place, **values}


def read_rows(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {key(row): row for row in csv.DictReader(file)}


def write_rows(path: Path, found: Mapping[tuple[str, ...], Mapping[str, Any]]) -> None:
    names = dict.fromkeys(name for row in found.values() for name in row)
    with written_beside(path) as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(names), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted(found.items()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--bits", nargs="+", default=["4,7", "3,7", "2,7", "8,4"])
    parser.add_argument("--observers", nargs="+", default=["minmax", "least_squares"])
    parser.add_argument("--rounding", nargs="+", default=["nearest", "adaptive"])
    parser.add_argument("--correction", nargs="+", default=["false", "true"])
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--rows", type=int, help="the first rows of the split; default: all")
    parser.add_argument("--batches", type=int, default=32, help="of training rows, to calibrate")
    parser.add_argument("--task", nargs="*", default=[], help="options of the task: source=folder")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--engine", choices=ENGINES, default="fbgemm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("docs/results/ranges.csv"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
