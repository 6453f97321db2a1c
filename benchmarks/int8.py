"""Compare the time of Monte Carlo prediction in int8 and in float: python benchmarks/int8.py

Every engine that can run here is compared with the float network. Both sides use the same network,
draws and rows; float uses channels_last. The sides are timed in pairs within one run, so that noise
of the machine affects both, and each result is the median of the ratios. Images are random and
networks untrained, which does not change the time.
"""

import argparse
import copy
import statistics

import torch
from torch import Tensor, nn
from train_step import machine, seconds

from bqnn.inference.predict import predictive
from bqnn.layers.bayes import to_bayes
from bqnn.layers.draws import held_draw
from bqnn.layers.dropout import to_mcdropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.markers import Add
from bqnn.nets import LeNet, ResNet
from bqnn.quant.engines import engine, usable_engine
from bqnn.quant.engines.contract import ActivationGrid, LayerEngine
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import convert
from bqnn.quant.simulated import calibrate, prepare
from bqnn.quant.spec import ENGINES, QuantSpec
from bqnn.training.process import keep_freed_memory, silence_known_warnings

NETS = {"lenet": (LeNet, (1, 28, 28)), "resnet": (ResNet, (3, 32, 32))}
METHODS = ("pointwise", "bbb", "mcdropout", "sghmc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=2, help="draws, or members of the ensemble")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--bits", type=int, nargs=2, default=(8, 7), help="weights, activations")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the command line does
    silence_known_warnings()
    print(machine(arguments.threads))
    print(f"{arguments.images} images, {arguments.samples} draws, batches of 256, weights and")
    print(f"activations of {arguments.bits[0]} and {arguments.bits[1]} bits;", end=" ")
    print("seconds in float / in int8, and the speedup of int8")
    engines = [name for name in arguments.engines if engine(name).missing() is None]
    for name in arguments.nets:
        x = torch.rand(arguments.images, *NETS[name][1]).to(memory_format=torch.channels_last)
        for method in arguments.methods:
            in_float = _net(name, method, arguments.samples)
            num_samples = 1 if method == "pointwise" else arguments.samples
            for chosen in engines:
                integer = integer_net(in_float, x[:256], chosen, arguments.bits)
                label = f"{name} {method} {chosen}"
                _compare(label, in_float, integer, x, num_samples, arguments.pairs)
    if "resnet" in arguments.nets:
        for chosen in engines:
            _compare_residual_sums(chosen, arguments.pairs)


def _compare(
    label: str, a: nn.Module, b: nn.Module, x: Tensor, num_samples: int, num_pairs: int
) -> None:
    for net in (a, b):
        predictive(net, x[:256], 1)  # warm up
    pairs = [
        tuple(seconds(lambda net=net: predictive(net, x, num_samples)) for net in (a, b))
        for _ in range(num_pairs)
    ]
    ratio = statistics.median(first / second for first, second in pairs)
    first, second = (statistics.median(side) for side in zip(*pairs, strict=True))
    draw = num_samples * statistics.median(seconds(lambda: _draw(b)) for _ in range(5))
    print(
        f"{label:<28} {first:7.2f} s / {second:7.2f} s = {ratio:5.2f}, "
        f"drawing and packing weights {100 * draw / second:4.1f} %",
        flush=True,
    )


def _compare_residual_sums(name: str, num_pairs: int) -> None:
    """Time the residual sums of the first stage of the ResNet, at a batch of 512."""
    chosen = usable_engine(name)
    if not isinstance(chosen, LayerEngine):
        return
    sides = [torch.rand(512, 24, 32, 32).to(memory_format=torch.channels_last) for _ in range(2)]
    grid, output = ActivationGrid(1 / 127, 0, 127), ActivationGrid(2 / 127, 0, 127)
    x, y = (chosen.quantize(side, grid) for side in sides)
    add = Add()
    pairs = [
        (seconds(lambda: add(*sides)), seconds(lambda: chosen.add(x, y, output, relu=True)))
        for _ in range(10 * num_pairs)
    ]
    slow, fast = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"residual sum, 512 x 24 x 32 x 32, {name}: {1000 * slow:.2f} ms in float / "
        f"{1000 * fast:.2f} ms in integers = {ratio:.2f}"
    )


def _net(name: str, method: str, num_members: int) -> nn.Module:
    kind, shape = NETS[name]
    net = kind(shape, (10,))
    if method == "bbb":
        net = to_bayes(net, prior_std=0.1, init_rho=-5.0)
    elif method == "mcdropout":
        net = to_mcdropout(net, rate=0.2)
    elif method == "sghmc":
        net = Ensemble(net, num_members)
        for _ in range(num_members):
            net.collect()
    return net.to(memory_format=torch.channels_last).eval()


def integer_net(net: nn.Module, x: Tensor, name: str, bits: tuple[int, int]) -> nn.Module:
    """Quantize a copy of a network for an engine, calibrated on inputs."""
    spec = QuantSpec(
        weight_bits=bits[0],
        activation_bits=bits[1],
        activation_observer="minmax",
        engine=name,
    )
    return convert(calibrate(prepare(fuse(copy.deepcopy(net)), spec), [x]))


def _draw(net: nn.Module) -> None:
    with held_draw(net, 0):
        pass


if __name__ == "__main__":
    main()
