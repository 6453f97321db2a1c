"""Integer modules: what a fake-quantized network becomes to run in int8."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.layers.draws import DrawnWeights, Stochastic, evaluation_noise
from bqnn.layers.dropout import MCDropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.markers import Add, Leave, Pool
from bqnn.quant.fbgemm import (
    ActivationGrid,
    FakeQuant,
    PackedWeight,
    add_relu,
    can_saturate,
    has_vnni,
    keep_scaled,
    quantized_weight,
)
from bqnn.quant.simulated import (
    RoundedOutput,
    SimulatedAdd,
    SimulatedEnter,
    SimulatedGaussianLayer,
    SimulatedLayer,
    SimulatedPointLayer,
    SimulatedPool,
)

log = logging.getLogger(__name__)


class IntegerLayer(nn.Module):
    """A point-valued layer: integer weights packed once."""

    def __init__(self, layer: SimulatedPointLayer, engine: str) -> None:
        super().__init__()
        factor, bias = layer.fold()
        quant = layer.weight_quant
        weight = quant.round(layer.folded_weight(factor))
        self.packed = PackedWeight(quantized_weight(weight, quant), bias, layer.geometry, engine)
        self.grid = ActivationGrid(layer.output_quant)
        self.relu = layer.relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.packed(x, self.relu, self.grid.scale, self.grid.zero_point)
        return self.grid.clamp(out)


class IntegerGaussianLayer(DrawnWeights):
    """A Bayesian layer: integers for mu and sigma, from which each draw is made and packed."""

    def __init__(self, layer: SimulatedGaussianLayer, engine: str) -> None:
        super().__init__()
        factor, bias = layer.fold()
        self.bias = None if bias is None else bias.detach()
        self.sign = None if factor is None else FakeQuant.along(layer.mean, factor.sign())
        mean, sigma = layer.folded_parameters(factor)
        self.grids = grids = layer.grids
        self.mean = mean.detach() if grids.mean is None else grids.mean.integers(mean)
        self.sigma = sigma if grids.sigma is None else grids.sigma.integers(sigma)
        self.geometry = layer.geometry
        self.grid = ActivationGrid(layer.output_quant)
        self.relu = layer.relu
        self.engine = engine

    def draw(self) -> PackedWeight:
        """One draw of the weights, packed."""
        grids = self.grids
        mean = self.mean if grids.mean is None else grids.mean.dequantize(self.mean)
        sigma = self.sigma if grids.sigma is None else grids.sigma.dequantize(self.sigma)
        eps = evaluation_noise(mean)
        if self.sign is not None:
            eps *= self.sign
        weight = grids.draw(mean, sigma, eps)
        packed = quantized_weight(weight, grids.weight)
        return PackedWeight(packed, self.bias, self.geometry, self.engine)

    def forward(self, x: Tensor) -> Tensor:
        out = self.weights()(x, self.relu, self.grid.scale, self.grid.zero_point)
        return self.grid.clamp(out)


class IntegerDropout(Stochastic):
    """Dropped values become the zero point; 1 / (1 - rate) goes into the scale: both are exact."""

    def __init__(self, dropout: MCDropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        if self.dropout.rate == 0:
            return x
        return keep_scaled(x, self.dropout.kept(x), 1 / (1 - self.dropout.rate))


class IntegerEnter(nn.Module):
    """Quantizes the network's inputs."""

    def __init__(self, enter: SimulatedEnter) -> None:
        super().__init__()
        self.grid = ActivationGrid(enter.output_quant)

    def forward(self, x: Tensor) -> Tensor:
        return self.grid.quantize(x)


class IntegerLeave(nn.Module):
    """Gives back floats."""

    def forward(self, x: Tensor) -> Tensor:
        return x.dequantize()


class IntegerAdd(Add):
    """The residual sum and its ReLU."""

    def __init__(self, add: SimulatedAdd) -> None:
        super().__init__()
        self.grid = ActivationGrid(add.output_quant)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return add_relu(x, y, self.grid)


class IntegerPool(Pool):
    """The average over an image, by way of floats: torch's own depends on the memory layout."""

    def __init__(self, pool: SimulatedPool) -> None:
        super().__init__()
        self.grid = ActivationGrid(pool.output_quant)

    def forward(self, x: Tensor) -> Tensor:
        return self.grid.quantize(super().forward(x.dequantize()))


@torch.no_grad()
def convert(net: nn.Module, engine: str) -> nn.Module:
    """Make a prepared network run in int8, in place; it is left in eval mode, on the CPU.

    ValueError: there is nothing to convert, or a fake quantizer has seen no data. On a CPU without
    VNNI a warning says where 16-bit sums can saturate.
    """
    if isinstance(net, Ensemble) and len(net) > 0:
        for index, member in enumerate(net.members):
            net.members[index] = convert(member, engine)
        net.current = nn.Identity()  # it answers in training, and as long as there is no member
        return net.eval()
    unseen = [n for n, m in net.named_modules() if isinstance(m, FakeQuant) and not m.has_range]
    if unseen:
        raise ValueError(
            f"convert: {unseen[0]} has seen no data, so it has no range; train the prepared "
            "network, or calibrate it"
        )
    _warn_of_saturation(net)
    net.eval().cpu()
    makers: dict[type[nn.Module], Any] = {
        SimulatedPointLayer: lambda layer: IntegerLayer(layer, engine),
        SimulatedGaussianLayer: lambda layer: IntegerGaussianLayer(layer, engine),
        SimulatedEnter: IntegerEnter,
        SimulatedAdd: IntegerAdd,
        SimulatedPool: IntegerPool,
        MCDropout: IntegerDropout,
        Leave: lambda _: IntegerLeave(),
    }
    found = [(name, m) for name, m in net.named_modules() if type(m) in makers]
    if not any(isinstance(module, SimulatedLayer) for _, module in found):
        raise ValueError("convert: the network has no fake-quantized layer; call prepare() first")
    for name, module in found:
        net.set_submodule(name, makers[type(module)](module))
    return net.eval()


def _warn_of_saturation(net: nn.Module) -> None:
    weight_bits, activation_bits = 0, 0
    for module in net.modules():
        if isinstance(module, SimulatedLayer):
            weight_bits = max(weight_bits, module.weight_grid.bits)
        is_output = isinstance(module, SimulatedLayer) and module.is_output  # no layer reads it
        if isinstance(module, SimulatedLayer | RoundedOutput) and not is_output:
            activation_bits = max(activation_bits, module.output_quant.bits)
    if can_saturate(weight_bits, activation_bits) and not has_vnni():
        log.warning(
            "this CPU has no VNNI: with %d-bit weights and %d-bit activations sums of two products "
            "saturate, and int8 can differ from the simulation; quant.activation_bits=7 is safe",
            weight_bits,
            activation_bits,
        )
