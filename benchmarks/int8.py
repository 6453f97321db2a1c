"""Compare the time of Monte Carlo prediction in int8 and in float: python benchmarks/int8.py

Every engine that can run here is compared with the float network. All use the same network, draws
and rows; float uses channels_last. They are timed in rounds, in each of which the float network and
all engines run once, so that noise of the machine affects all, and each result is the median of the
ratios. Images are random and networks untrained, which does not change the time.

The default takes a few minutes on two cores: one pass of pointwise networks and 20 draws of bbb.
"""

import argparse
import copy
import statistics
from collections.abc import Mapping

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
IMAGES = {"lenet": 2048, "resnet": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=3, help="rounds")
    parser.add_argument("--images", type=int, help="the default is 2048 for lenet, 512 for resnet")
    parser.add_argument("--samples", type=int, default=20, help="draws, or members of the ensemble")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:2])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--bits", type=int, nargs=2, default=(8, 7), help="weights, activations")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the command line does
    silence_known_warnings()
    print(machine(arguments.threads))
    print(
        f"weights and activations of {arguments.bits[0]} and {arguments.bits[1]} bits, batches of"
    )
    print("256; seconds in float / in int8, and the speedup of int8, medians")
    engines = [name for name in arguments.engines if engine(name).missing() is None]
    for name in arguments.nets:
        count = IMAGES[name] if arguments.images is None else arguments.images
        x = torch.rand(count, *NETS[name][1]).to(memory_format=torch.channels_last)
        for method in arguments.methods:
            in_float = _net(name, method, arguments.samples)
            num_samples = 1 if method == "pointwise" else arguments.samples
            nets = {each: integer_net(in_float, x[:256], each, arguments.bits) for each in engines}
            print(f"{name} {method}, {count} images, {num_samples} draws")
            _compare(in_float, nets, x, num_samples, arguments.pairs)
    if "resnet" in arguments.nets:
        for chosen in engines:
            _compare_residual_sums(chosen, arguments.pairs)


def _compare(
    in_float: nn.Module, nets: Mapping[str, nn.Module], x: Tensor, num_samples: int, num_rounds: int
) -> None:
    sides = [in_float, *nets.values()]
    for net in sides:
        predictive(net, x[:256], 1)  # warm up
    rounds = [
        [seconds(lambda net=net: predictive(net, x, num_samples)) for net in sides]
        for _ in range(num_rounds)
    ]
    for place, (name, net) in enumerate(nets.items(), start=1):
        ratio = statistics.median(each[0] / each[place] for each in rounds)
        first, second = (statistics.median(each[side] for each in rounds) for side in (0, place))
        draw = num_samples * statistics.median(
            seconds(lambda net=net: _draw(net)) for _ in range(5)
        )
        print(
            f"    {name:<12} {first:7.2f} s / {second:7.2f} s = {ratio:5.2f}, "
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
