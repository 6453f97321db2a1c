"""Compare the time of Monte Carlo prediction in int8 and in float: python benchmarks/int8.py

Both sides use the same network, draws and rows; float uses channels_last. The sides are timed in
pairs within one run, so that noise of the machine affects both, and each result is the median of
the ratios. Images are random and networks untrained, which does not change the time. The last
comparison times the residual sum in integers against a sum that converts to floats.
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
from bqnn.quant.fbgemm import ActivationGrid, make_fake_quant
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import IntegerAdd, convert
from bqnn.quant.simulated import SimulatedAdd, calibrate, prepare
from bqnn.quant.spec import QuantSpec
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
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the command line does
    silence_known_warnings()
    print(machine(arguments.threads))
    print(f"{arguments.images} images, {arguments.samples} draws, batches of 256, 8-bit weights,")
    print("7-bit activations; seconds in float / in int8, and the speedup of int8")
    for name in arguments.nets:
        x = torch.rand(arguments.images, *NETS[name][1]).to(memory_format=torch.channels_last)
        for method in arguments.methods:
            in_float = _net(name, method, arguments.samples)
            num_samples = 1 if method == "pointwise" else arguments.samples
            for engine in ("fbgemm", "x86"):
                integer = _integer(in_float, x[:256], engine)
                _compare(
                    f"{name} {method} {engine}", in_float, integer, x, num_samples, arguments.pairs
                )
    if "resnet" in arguments.nets:
        _compare_residual_sums(arguments.pairs)


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
        f"{label:<26} {first:7.2f} s / {second:7.2f} s = {ratio:5.2f}, "
        f"drawing and packing weights {100 * draw / second:4.1f} %"
    )


def _compare_residual_sums(num_pairs: int) -> None:
    """Time the residual sums of the first stage of the ResNet, at a batch of 512."""
    quant = make_fake_quant(7, signed=False)
    add = SimulatedAdd(Add(), QuantSpec())
    x, y = (torch.rand(512, 24, 32, 32).to(memory_format=torch.channels_last) for _ in range(2))
    for module, values in ((quant, x), (add.output_quant, x + y)):
        module.watch(values)
    grid, sums = ActivationGrid(quant), IntegerAdd(add)
    x, y = grid.quantize(x), grid.quantize(y)

    def through_floats() -> Tensor:
        return sums.grid.quantize((x.dequantize() + y.dequantize()).relu_())

    pairs = [(seconds(through_floats), seconds(lambda: sums(x, y))) for _ in range(10 * num_pairs)]
    slow, fast = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"residual sum, 512 x 24 x 32 x 32: {1000 * slow:.2f} ms through floats / "
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


def _integer(net: nn.Module, x: Tensor, engine: str) -> nn.Module:
    spec = QuantSpec(activation_observer="minmax", engine=engine)
    return convert(calibrate(prepare(fuse(copy.deepcopy(net)), spec), [x]), engine)


def _draw(net: nn.Module) -> None:
    with held_draw(net, 0):
        pass


if __name__ == "__main__":
    main()
