"""Measure the latency of predictions in a service: python benchmarks/serve.py

A LeNet for digits predicts batches of several sizes with a bank of draws: in float, with every
engine that can run here, and as an exported ONNX file; with 1, 5 and 20 draws, with an early stop
after at most 20, and in a single pass. Each side (float, an engine, the file) and each number of
threads runs in a process of its own, which prints the peak of its memory.

Each prediction is timed in turn with as many passes of the pointwise network of the same side (20
for early stop and single pass), so that noise of the machine affects both, and the ratio is the
median over these pairs. `--run` takes the folder of a float run on digits; without it, the network
is untrained, and rows settle at other numbers of draws.
"""

import argparse
import copy
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from int8 import integer_net
from torch import Tensor, nn
from train_step import machine, seconds

from bqnn.checkpoints.recipe import build, load
from bqnn.data import DigitsData
from bqnn.export.measure import peak_bytes
from bqnn.inference.moments import NUM_SAMPLES, SinglePass
from bqnn.inference.predict import Bank, predictive_sets, predictive_until_settled
from bqnn.methods import Method
from bqnn.quant.engines import engine
from bqnn.quant.fuse import fuse
from bqnn.quant.onnx.session import missing_packages, start_session
from bqnn.quant.simulated import calibrate, prepare
from bqnn.quant.spec import ENGINES, QuantSpec
from bqnn.training.process import keep_freed_memory, silence_known_warnings

BITS = (8, 7)  # of weights and activations
TOLERANCE, MAX_SAMPLES = 0.02, 20
OPTIONS: dict[str, dict[str, Any]] = {
    "pointwise": {},
    "bbb": {"prior_std": 0.05, "init_rho": -5.0, "beta": 0.002},
    "mcdropout": {"rate": 0.2, "drop_before_output": True},
}
Call = Callable[[], object]


@dataclass(frozen=True)
class Subjects:
    """What is measured on one side: two methods, and the rows that they predict."""

    side: str
    point: Method
    bayes: Method
    rows: Tensor
    fitted_on: Tensor
    batches: Sequence[int]
    draws: Sequence[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--method", choices=("bbb", "mcdropout"), default="bbb")
    parser.add_argument("--run", type=Path, help="the folder of a float run of the method")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # of a child
    arguments = parser.parse_args()
    if arguments.alone:
        measure(arguments)
        return
    for threads in arguments.threads:
        print(machine(threads))
        print(f"LeNet for digits, {arguments.method}, weights and activations of 8 and 7 bits,")
        print(
            f"{arguments.rounds} rounds; milliseconds: median and 99th percentile; rows a second;"
        )
        print("passes of the pointwise network, milliseconds (median); median ratio to them")
        for side in arguments.sides:
            options = ["--alone", "--sides", side, "--threads", str(threads)]
            subprocess.run([sys.executable, __file__, *sys.argv[1:], *options], check=True)


def measure(arguments: argparse.Namespace) -> None:
    """Measure one side with one number of threads in this process."""
    (side,), (threads,) = arguments.sides, arguments.threads
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the command line does
    silence_known_warnings()
    missing = missing_packages() if side == "file" else None
    if side in ENGINES:
        missing = engine(side).missing()
    if missing is not None:
        print(f"{side}: {missing}")
        return
    data = DigitsData()
    data.setup()
    rows, fitted_on = (data.normalize(part.inputs) for part in (data.test, data.train))
    point = method("pointwise", None)
    bayes = method(arguments.method, arguments.run)
    subjects = Subjects(
        side, point, bayes, rows, fitted_on[:256], arguments.batches, arguments.draws
    )
    make = file_calls if side == "file" else calls
    for label, batch, call, passes in make(subjects):
        report(f"{side:<12} batch {batch:<4} {label:<12}", batch, call, passes, arguments.rounds)
    peak = peak_bytes()
    print(f"{side:<12} peak memory {'unknown' if peak is None else f'{peak / 2**20:.0f} MiB'}")


def method(name: str, run: Path | None) -> Method:
    """Load the method of a run, or build it untrained."""
    if run is not None:
        return load(run / "checkpoint.ckpt")
    recipe = {
        "version": 1,
        "stage": "float",
        "seed": 0,
        "method": {"name": name, "optimizer": {"name": "adam"}, **OPTIONS[name]},
        "net": {"name": "lenet"},
        "task": {"name": "digits", "dataset": "digits"},
        "facts": {
            "likelihood": "classification",
            "class_names": [str(digit) for digit in range(10)],
            "input_shape": [1, 8, 8],
            "input_scale": 16.0,
            "input_mean": [0.3],
            "input_std": [0.4],
            "num_train": 1000,
        },
    }
    return build(recipe).eval()


def calls(s: Subjects) -> Iterator[tuple[str, int, Call, Call]]:
    """Yield a label, the batch size, a prediction, and the passes of the pointwise network."""
    bayes, nets = s.bayes, [s.point.net, s.bayes.net]
    if s.side != "float":
        nets = [integer_net(net, s.fitted_on, s.side, BITS) for net in nets]
    plain, net = nets
    bank = Bank(net, MAX_SAMPLES)
    single_pass = None
    if s.side == "float":
        single_pass = SinglePass(net, bayes.likelihood)
        single_pass.fit(s.fitted_on)

    def is_settled(draws: Tensor) -> Tensor:
        return bayes.likelihood.is_settled(draws, TOLERANCE)

    def drawn(x: Tensor, count: int) -> object:
        return bayes.likelihood.answer(*predictive_sets(net, [x], count, bank=bank))

    def early(x: Tensor) -> object:
        (draws,) = predictive_until_settled(net, [x], MAX_SAMPLES, is_settled, bank=bank)
        return bayes.likelihood.answer(*draws)

    for size in s.batches:
        x = s.rows[:size]
        for count in s.draws:
            yield (
                f"{count} draws",
                size,
                partial(drawn, x, count),
                partial(_passes, plain, x, count),
            )
        passes = partial(_passes, plain, x, MAX_SAMPLES)
        yield "early stop", size, partial(early, x), passes
        if single_pass is not None:
            yield "single pass", size, partial(_single, single_pass, bayes, x), passes


def _single(single_pass: SinglePass, bayes: Method, x: Tensor) -> object:
    return bayes.likelihood.answer(single_pass.predict(x, NUM_SAMPLES))


def file_calls(s: Subjects) -> Iterator[tuple[str, int, Call, Call]]:
    """Yield the calls of exported files, as `calls` does."""
    from bqnn.export.model import export

    raw = torch.randint(17, s.rows.shape, dtype=torch.uint8)  # other rows take the same time
    threads = torch.get_num_threads()
    spec = QuantSpec(weight_bits=BITS[0], activation_bits=BITS[1])
    sessions = {}
    for name, made in (("point", s.point), ("bayes", s.bayes)):
        quantized = copy.copy(made)
        quantized.net = calibrate(prepare(fuse(copy.deepcopy(made.net)), spec), [s.fitted_on])
        for count in {1} if name == "point" else set(s.draws):
            content = export(quantized, count).content()
            sessions[name, count] = start_session(content, threads)
    for size in s.batches:
        inputs = {"inputs": raw[:size].numpy()}
        for count in s.draws:
            drawn = partial(sessions["bayes", count].run, None, inputs)
            yield f"{count} draws", size, drawn, partial(_runs, sessions["point", 1], inputs, count)


def report(label: str, batch: int, call: Call, passes: Call, rounds: int) -> None:
    """Time a prediction and passes of the pointwise network in turn, and print a line."""
    call()  # packs the weights
    passes()
    pairs = [(seconds(call), seconds(passes)) for _ in range(rounds)]
    found, others = (sorted(side) for side in zip(*pairs, strict=True))
    median, tail = statistics.median(found), found[min(rounds - 1, int(0.99 * rounds))]
    ratio = statistics.median(first / second for first, second in pairs)
    print(
        f"{label} {1000 * median:8.2f} {1000 * tail:8.2f} {batch / median:8.0f} rows/s "
        f"{1000 * statistics.median(others):8.2f} {ratio:6.2f}",
        flush=True,
    )


@torch.no_grad()
def _passes(net: nn.Module, x: Tensor, count: int) -> None:
    for _ in range(count):
        net(x)


def _runs(session: Any, inputs: dict[str, Any], count: int) -> None:
    for _ in range(count):
        session.run(None, inputs)


SIDES: Sequence[str] = ("float", *ENGINES, "file")


if __name__ == "__main__":
    main()
