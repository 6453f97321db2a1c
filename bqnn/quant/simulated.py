"""Fake-quantized modules: floats that lie on the grids of the integers to come.

While gradients are wanted, these floats are what layers compute with. In evaluation without
gradients each layer instead adds up products of whole numbers, exactly, in floats that are wide
enough, and rounds as the int8 operators do. So what an int8 network computes is known in advance,
bit for bit.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.layers.bayes import GaussianWeight, local_reparametrization
from bqnn.layers.draws import evaluation_noise
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.linear_map import linear_map
from bqnn.layers.markers import Add, Enter, Pool
from bqnn.layers.swap import check_no_hooks
from bqnn.quant.fbgemm import FakeQuant, check_engine, layout, requantize, requantized_sum
from bqnn.quant.fuse import Fused
from bqnn.quant.grids import Grid, carry_grids, grid_of, on_grid
from bqnn.quant.spec import QuantSpec
from bqnn.quant.stochastic import GaussianGrids, activation_fake_quant, weight_fake_quant


class RoundedOutput(nn.Module):
    """Rounds what the next class in line computes."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.output_quant = activation_fake_quant(spec)

    def forward(self, *inputs: Tensor) -> Tensor:
        return rounded(super().forward(*inputs), self.output_quant)


class SimulatedLayer(nn.Module):
    """A fused layer with its weights and its outputs on their grids.

    Batch norm is folded into the weights before they are rounded, as it will be in integers.
    While it learns its statistics, the output is divided by the folded factor and normalized as
    ever, so that training sees the rounding and batch norm sees what it always did (Krishnamoorthi,
    arXiv 1806.08342, figure 8). `frozen` ends that: statistics stay as they are.
    """

    def __init__(self, fused: Fused, spec: QuantSpec) -> None:
        nn.Module.__init__(self)
        self.bias: Any = fused.layer.bias
        self.bn = fused.bn
        self.relu = fused.relu
        self.geometry = fused.geometry
        self.is_output = fused.is_output
        self.engine = spec.engine
        self.output_quant = activation_fake_quant(spec)
        self.frozen = False

    def forward(self, x: Tensor) -> Tensor:
        grid = grid_of(x)
        if grid is None or self.training or torch.is_grad_enabled():
            return rounded(self.before_rounding(x), self.output_quant)
        factor, bias = self.fold()
        weight, quant = self.rounded_weight(factor), self.weight_grid
        integers = (weight / quant.along(weight, quant.scale)).round_()
        sums = self.exact_sums((x / grid.scale).round_(), integers, grid.largest)
        output = self.output_quant
        out = requantize(sums, grid.scale, quant, bias, output, self.relu, self.engine)
        return on_grid(out, _grid(output))

    def exact_sums(self, x: Tensor, weight: Tensor, largest: int) -> Tensor:
        """The linear map of whole numbers x, |x| <= largest: float32, rounded once at most."""
        bound = largest * weight.abs().flatten(1).sum(1).max()
        if bound < 2**24:  # every partial sum is a float32
            return self.linear_map(x, weight)
        return self.linear_map(x.double(), weight.double()).float()

    def before_rounding(self, x: Tensor) -> Tensor:
        """The outputs that `output_quant` rounds."""
        if self.bn is not None and self.training and not self.frozen:
            factor = _nonzero(self.fold()[0])
            out = self.apply_weights(x, factor, None) / _like_outputs(factor)
            out = self.bn(out if self.bias is None else out + _like_outputs(self.bias))
        else:
            out = self.apply_weights(x, *self.fold())
        return out.relu() if self.relu else out

    def fold(self) -> tuple[Tensor | None, Tensor | None]:
        """The factor [C] on the weights and the bias [C] that batch norm comes down to."""
        if self.bn is None:
            return None, self.bias
        assert self.bn.running_var is not None
        assert self.bn.running_mean is not None
        factor = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
        mean = self.bn.running_mean
        return factor, self.bn.bias + ((0 if self.bias is None else self.bias) - mean) * factor

    @property
    def weight_grid(self) -> FakeQuant:
        """Where the weights of a prediction lie."""
        raise NotImplementedError

    def rounded_weight(self, factor: Tensor | None) -> Tensor:
        """The weights of a prediction, each output channel times a factor, on their grid."""
        raise NotImplementedError

    def apply_weights(self, x: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
        """The layer's linear map at its rounded weights, each output channel times a factor."""
        return self.linear_map(x, self.rounded_weight(factor), bias)

    def linear_map(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_map(x, _laid_out_as(x, weight), bias, self.geometry)

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


class SimulatedPointLayer(SimulatedLayer):
    """A linear layer or convolution with one value per weight."""

    def __init__(self, fused: Fused, spec: QuantSpec) -> None:
        super().__init__(fused, spec)
        assert isinstance(fused.layer, nn.Linear | nn.Conv2d)
        self.weight = fused.layer.weight
        self.weight_quant = weight_fake_quant(spec, len(self.weight))

    @property
    def weight_grid(self) -> FakeQuant:
        return self.weight_quant

    def rounded_weight(self, factor: Tensor | None) -> Tensor:
        return self.weight_quant(self.folded_weight(factor))

    def folded_weight(self, factor: Tensor | None) -> Tensor:
        return self.weight if factor is None else self.weight * FakeQuant.along(self.weight, factor)


class SimulatedGaussianLayer(SimulatedLayer, GaussianWeight):
    """A Bayesian layer: local reparametrization in training, weights drawn in evaluation."""

    def __init__(self, fused: Fused, spec: QuantSpec) -> None:
        SimulatedLayer.__init__(self, fused, spec)
        assert isinstance(fused.layer, GaussianWeight)
        self.mean = fused.layer.mean
        self.rho = fused.layer.rho
        self.prior_std = fused.layer.prior_std
        self.grids = GaussianGrids(spec, len(self.mean))

    @property
    def weight_grid(self) -> FakeQuant:
        return self.grids.weight

    def rounded_weight(self, factor: Tensor | None) -> Tensor:
        return self.weights()  # they are drawn with batch norm folded in

    def apply_weights(self, x: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
        if not self.training:
            return super().apply_weights(x, factor, bias)
        mean, sigma = self.grids.parameters_on_grid(*self.folded_parameters(factor))
        return local_reparametrization(
            x, _laid_out_as(x, mean), sigma.square(), bias, self.geometry
        )

    def draw(self) -> Tensor:
        """One draw of the weights, with batch norm folded in, on their grid."""
        factor, _ = self.fold()
        parameters = self.grids.parameters_on_grid(*self.folded_parameters(factor))
        eps = evaluation_noise(self.mean)
        if factor is not None:  # so that equal noise is an equal draw of the network in float
            eps *= FakeQuant.along(eps, factor.sign())
        return self.grids.draw(*parameters, eps)

    def folded_parameters(self, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """mu and sigma of the weights with batch norm folded in; a factor may be negative."""
        if factor is None:
            return self.mean, self.sigma
        factor = FakeQuant.along(self.mean, factor)
        return self.mean * factor, self.sigma * factor.abs()


class SimulatedEnter(RoundedOutput, Enter):
    """Rounds the network's inputs."""


class SimulatedAdd(RoundedOutput, Add):
    """The residual sum and its ReLU, rounded."""

    def forward(self, *inputs: Tensor) -> Tensor:
        x, y = inputs
        x_grid, y_grid = grid_of(x), grid_of(y)
        if x_grid is None or y_grid is None or self.training or torch.is_grad_enabled():
            return super().forward(x, y)
        out = requantized_sum(x, x_grid, y, y_grid, self.output_quant)
        return on_grid(out, _grid(self.output_quant))


class SimulatedPool(RoundedOutput, Pool):
    """The average over an image, rounded."""


def prepare(net: nn.Module, spec: QuantSpec) -> nn.Module:
    """Give a fused network its fake quantizers, in place; an ensemble's members get their own.

    ValueError: nothing is fused, no `Enter` marks where integers begin, an override of the spec
    matches no layer, or this torch lacks the engine that the spec names.
    """
    check_engine(spec.engine)
    for part in _parts(net):
        makers: dict[type[nn.Module], Any] = {
            Fused: _simulated_layer,
            Enter: lambda _, spec: SimulatedEnter(spec),
            Add: lambda _, spec: SimulatedAdd(spec),
            Pool: lambda _, spec: SimulatedPool(spec),
        }
        found = [(name, m) for name, m in part.named_modules() if type(m) in makers]
        kinds = {type(module) for _, module in found}
        if Fused not in kinds:
            raise ValueError("prepare: the network has no fused layer; call fuse() on it first")
        if Enter not in kinds:
            raise ValueError(
                "prepare: the network does not say where integers begin; put an Enter before its "
                "first layer and a Leave after its last (bqnn.layers.markers)"
            )
        spec.check_overrides([name for name, _ in found])
        for name, module in found:
            check_no_hooks(name, module)
            is_output = isinstance(module, Fused) and module.is_output
            layer_spec = spec.for_layer(name, is_output)
            made = makers[type(module)](module, layer_spec).train(module.training)
            part.set_submodule(name, made.to(next(part.parameters()).device))
        carry_grids(part)
    return net


def is_prepared(net: nn.Module) -> bool:
    """Whether a network has its fake quantizers already."""
    return any(isinstance(module, FakeQuant) for module in net.modules())


def freeze(net: nn.Module, frozen: bool = True) -> None:
    """Keep all ranges and the statistics of batch norm as they are, or let them move again."""
    for module in net.modules():
        if isinstance(module, FakeQuant | SimulatedLayer):
            module.frozen = frozen


def enable(net: nn.Module, enabled: bool = True) -> None:
    """Round, or do not: without rounding a prepared network computes what it did in float."""
    for module in net.modules():
        if isinstance(module, FakeQuant):
            module.enabled = enabled


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set every range from what the float network computes for these inputs, without training.

    ValueError: there are no inputs, or a fake quantizer saw nothing of them.
    """
    quants = [module for module in net.modules() if isinstance(module, FakeQuant)]
    net.eval()
    enable(net, False)
    for quant in quants:
        quant.train()
    for inputs in batches:
        for part in _parts(net):
            part(inputs)
    for quant in quants:
        quant.eval()
        quant.settle()
    enable(net)
    for name, module in net.named_modules():
        if isinstance(module, FakeQuant) and not module.has_range:
            raise ValueError(
                f"calibrate: {name} has seen no data, so it has no range; give one batch or more "
                "that pass through all of the network"
            )
    return net


def rounded(x: Tensor, quant: FakeQuant) -> Tensor:
    """Activations rounded by `quant`, marked with its grid."""
    out = quant(x)
    return on_grid(out, _grid(quant)) if quant.enabled else out


def _grid(quant: FakeQuant) -> Grid:
    return Grid(float(quant.scale), int(quant.zero_point), quant.largest)


def _parts(net: nn.Module) -> list[nn.Module]:
    """The networks that are quantized on their own: the members of an ensemble, or all of it."""
    return [net.current, *net.members] if isinstance(net, Ensemble) else [net]


def _simulated_layer(fused: Fused, spec: QuantSpec) -> SimulatedLayer:
    is_gaussian = isinstance(fused.layer, GaussianWeight)
    return (SimulatedGaussianLayer if is_gaussian else SimulatedPointLayer)(fused, spec)


def _nonzero(factor: Tensor | None) -> Tensor:
    """The factor, and 1 where dividing by it would overflow: batch norm is constant there."""
    assert factor is not None
    return torch.where(factor.abs() > 1e-12, factor, torch.ones_like(factor))


def _laid_out_as(x: Tensor, weight: Tensor) -> Tensor:
    """The weight in channels_last where the inputs are: a convolution goes by its weight."""
    last = torch.channels_last
    return weight.to(memory_format=last) if layout(x) == last else weight


def _like_outputs(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1)
