"""Measure the latency of a prepared model: python benchmarks/serve.py

A LeNet for digits under one method predicts batches of several sizes with a bank of draws, in float
and with every engine that can run here. Rounds of all sides alternate, so that noise of the machine
affects all, and the ratio is the median over rounds of a side's time by that of its pointwise
network, which makes as many passes as there are draws.
"""

import argparse
import resource
import statistics
from collections.abc import Callable

import torch
from int8 import integer_net
from torch import Tensor, nn
from train_step import machine, seconds

from bqnn.inference.predict import Bank, predictive_sets
from bqnn.layers.bayes import to_bayes
from bqnn.layers.dropout import to_mcdropout
from bqnn.nets import LeNet
from bqnn.quant.engines import engine
from bqnn.quant.spec import ENGINES
from bqnn.training.process import keep_freed_memory, silence_known_warnings

SHAPE = (1, 8, 8)
BITS = (8, 7)  # of weights and activations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--method", choices=("bbb", "mcdropout"), default="bbb")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the command line does
    silence_known_warnings()
    print(machine(arguments.threads))
    print(f"LeNet for digits, {arguments.method}, weights and activations of 8 and 7 bits, n =")
    print(f"{arguments.rounds} rounds; milliseconds: median and 99th percentile, rows a second,")
    print("passes of the pointwise network (median), and the median ratio to them")
    torch.manual_seed(0)
    point, bayes = LeNet(SHAPE, (10,)).eval(), _net(arguments.method)
    x = torch.rand(max(arguments.batches), *SHAPE)
    sides: dict[str, tuple[nn.Module, nn.Module]] = {"float": (point, bayes)}
    for name in arguments.engines:
        if engine(name).missing() is None:
            sides[name] = (integer_net(point, x, name, BITS), integer_net(bayes, x, name, BITS))
    for batch in arguments.batches:
        for draws in arguments.draws:
            _measure(sides, x[:batch], draws, arguments.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of the process, with all engines: {peak:.0f} MiB")


def _measure(
    sides: dict[str, tuple[nn.Module, nn.Module]], x: Tensor, draws: int, rounds: int
) -> None:
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    for name, (point, net) in sides.items():
        bank = Bank(net, draws)
        calls[name] = (
            lambda point=point: _passes(point, x, draws),  # type: ignore[misc]
            lambda net=net, bank=bank: predictive_sets(net, [x], draws, bank=bank),  # type: ignore[misc]
        )
        for call in calls[name]:
            call()  # packs the weights
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (point_call, call) in calls.items():
            times[name].append((seconds(point_call), seconds(call)))
    for name, pairs in times.items():
        passes, found = (sorted(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(second / first for first, second in pairs)
        median = statistics.median(found)
        tail = found[min(len(found) - 1, int(0.99 * len(found)))]
        print(
            f"batch {len(x):<4} draws {draws:<3} {name:<12} {1000 * median:8.2f} "
            f"{1000 * tail:8.2f} {len(x) / median:9.0f} rows/s   "
            f"{1000 * statistics.median(passes):8.2f} {ratio:6.2f}",
            flush=True,
        )


@torch.no_grad()
def _passes(net: nn.Module, x: Tensor, count: int) -> None:
    for _ in range(count):
        net(x)


def _net(method: str) -> nn.Module:
    net = LeNet(SHAPE, (10,))
    if method == "bbb":
        return to_bayes(net, prior_std=0.3, init_rho=-5.0).eval()
    return to_mcdropout(net, rate=0.2).eval()


if __name__ == "__main__":
    main()
