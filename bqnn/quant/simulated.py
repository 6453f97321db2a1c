"""Fake-quantized modules: they compute floats on the grids of the future integers.

While gradients are wanted, these floats are what layers compute with. In evaluation without
gradients each layer instead adds up products of whole numbers, exactly, in floats that are wide
enough, and rounds as the int8 operators do. So what an int8 network computes is known in advance,
bit for bit.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.layers.bayes import GaussianWeight, local_reparametrization
from bqnn.layers.draws import evaluation_noise
from bqnn.layers.dropout import MCDropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.finite import refuse_non_finite
from bqnn.layers.linear_map import linear_map
from bqnn.layers.markers import Add, Enter, Leave, Pool
from bqnn.layers.swap import check_no_hooks
from bqnn.quant import kernels
from bqnn.quant.fbgemm import (
    FakeQuant,
    check_engine,
    in_batch,
    layout,
    requantize,
    requantized_sum,
)
from bqnn.quant.fuse import Fused
from bqnn.quant.grids import UNTRACED, Grid, OnGrid, grid_of, plain
from bqnn.quant.region import check_region
from bqnn.quant.spec import QuantSpec
from bqnn.quant.stochastic import GaussianGrids, activation_fake_quant, weight_fake_quant


class OutputOnGrid(nn.Module):
    """A module whose outputs are rounded to a grid, and whose inputs lie on one."""

    path = ""  # its name in the network

    def __init__(self, spec: QuantSpec) -> None:
        nn.Module.__init__(self)  # the next class in line may want arguments
        self.output_quant = activation_fake_quant(spec)

    def grids_of(self, *inputs: Tensor) -> list[Grid] | None:
        """Return the grids of the inputs, or None while rounding is off.

        TypeError: an input lies on none, so that int8 would read floats.
        """
        grids = [grid for grid in map(grid_of, inputs) if grid is not None]
        if not self.output_quant.enabled:
            return None
        if len(grids) < len(inputs):
            raise TypeError(
                f"{self.path or type(self).__name__} reads an input that is not quantized: it is "
                "outside the integer region, or something before it computes in floats; put an "
                "Enter before it (bqnn.layers.markers)"
            )
        return grids

    def rounded(self, x: Tensor) -> Tensor:
        """Outputs on their grid."""
        return self.on_grid(self.output_quant(x))

    def on_grid(self, x: Tensor) -> Tensor:
        """Outputs that were rounded, marked."""
        quant = self.output_quant
        if not quant.enabled:
            return x
        grid = Grid(float(quant.scale), int(quant.zero_point), quant.largest, self.path)
        return OnGrid.of(x, grid)


class SimulatedLayer(OutputOnGrid):
    """A fused layer with its weights and its outputs on their grids.

    Batch norm is folded into the weights before they are rounded, as it will be in integers.
    While it learns its statistics, the output is divided by the folded factor and normalized as
    ever, so that training sees the rounding and batch norm sees what it always did (Krishnamoorthi,
    arXiv 1806.08342, figure 8). `frozen` ends that: statistics stay as they are.
    """

    def __init__(self, fused: Fused, spec: QuantSpec) -> None:
        OutputOnGrid.__init__(self, spec)
        self.bias: Any = fused.layer.bias
        self.bn = fused.bn
        self.relu = fused.relu
        self.geometry = fused.geometry
        self.is_output = fused.is_output
        self.engine = spec.engine
        self.allow_saturation = spec.allow_saturation
        self.frozen = False

    def forward(self, x: Tensor) -> Tensor:
        grids = self.grids_of(x)
        rows = in_batch(plain(x), is_conv=self.geometry is not None)
        if grids is None or self.training or torch.is_grad_enabled():
            out = self.output_quant(self.before_rounding(rows))
        else:
            out = self.executed(rows, grids[0])
        if out.dim() != x.dim():  # of a linear layer
            out = out.reshape(*x.shape[:-1], out.shape[-1])
        return self.on_grid(out)

    def executed(self, x: Tensor, grid: Grid) -> Tensor:
        """Compute the output of the int8 layer for inputs [N, F] or [B, C, H, W] on a grid."""
        factor, bias = self.fold()
        weight, quant = self.rounded_weight(factor), self.weight_grid
        integers = (weight / quant.along(weight, quant.scale)).round_()
        sums = self.exact_sums((x / grid.scale).round_(), integers, grid.largest)
        kernel = self.kernel(grid.zero_point)
        rounding = kernels.rounding_of(kernel, x.shape)
        return requantize(sums, grid.scale, quant, bias, self.output_quant, self.relu, rounding)

    def kernel(self, input_zero_point: int = 0) -> kernels.Layer:
        """Return the properties by which an engine selects the kernel of this layer."""
        weight, output = self.weight_grid, self.output_quant
        zero_points = (weight.zero_point.any(), input_zero_point, output.zero_point.any())
        return kernels.Layer(
            self.engine,
            self.weight_shape,
            self.geometry,
            per_channel=weight.channels is not None,
            has_bias=self.bias is not None or self.bn is not None,
            relu=self.relu,
            is_zero=tuple(not bool(value) for value in zero_points),  # type: ignore[arg-type]
        )

    def exact_sums(self, x: Tensor, weight: Tensor, largest: int) -> Tensor:
        """Apply the linear map to integers x, |x| <= largest; rounded at most once."""
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
        """Return the factor [C] on the weights and the bias [C] that fold batch norm."""
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

    @property
    def weight_shape(self) -> tuple[int, ...]:
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

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

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

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape)

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


class SimulatedEnter(OutputOnGrid, Enter):
    """Rounds the network's inputs."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise TypeError(UNTRACED)
        if grid_of(x) is not None:
            raise TypeError(
                f"{self.path} is an Enter inside the integer region; remove it, or put a Leave "
                "before it"
            )
        return self.rounded(x)


class SimulatedLeave(Leave):
    """Gives back floats."""

    def forward(self, x: Tensor) -> Tensor:
        return plain(x)


class SimulatedAdd(OutputOnGrid, Add):
    """The rounded residual sum with its ReLU."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        grids = self.grids_of(x, y)
        x, y = plain(x), plain(y)
        if grids is None or self.training or torch.is_grad_enabled():
            return self.rounded(super().forward(x, y))
        return self.on_grid(requantized_sum(x, grids[0], y, grids[1], self.output_quant))


class SimulatedPool(OutputOnGrid, Pool):
    """The average over an image, rounded."""

    def forward(self, x: Tensor) -> Tensor:
        self.grids_of(x)
        return self.rounded(super().forward(plain(x)))


class SimulatedDropout(MCDropout):
    """Dropout on a grid: it scales the step of the grid."""

    def forward(self, x: Tensor) -> Tensor:
        grid = grid_of(x)
        out = super().forward(plain(x))
        if grid is None:
            return out
        return OnGrid.of(out, grid._replace(scale=grid.scale / (1 - self.rate)))


def prepare(net: nn.Module, spec: QuantSpec) -> nn.Module:
    """Insert fake quantizers into a fused network, in place. Ensemble members get their own.

    ValueError: nothing is fused, `Enter` or `Leave` are missing, an override of the spec matches
    no layer, or this torch lacks the engine that the spec names. TypeError: something between
    `Enter` and `Leave` is not known in integers, a layer stands outside, has hooks or has weights
    that are not float32. A network that is refused stays as it was.
    """
    check_engine(spec.engine)
    if not any(isinstance(module, Fused) for module in net.modules()):
        raise ValueError("prepare: the network has no fused layer; call fuse() on it first")
    check_region(_parts(net)[0])  # members are copies of one network
    for part in _parts(net):
        _check_modules(part)
    for part in _parts(net):
        device = next(part.parameters()).device
        found = [(name, m) for name, m in part.named_modules() if type(m) in SIMULATED]
        spec.check_overrides([name for name, module in found if type(module) in ROUNDED])

        def made(name: str, module: nn.Module, device: torch.device = device) -> nn.Module:
            is_output = isinstance(module, Fused) and module.is_output
            new = SIMULATED[type(module)](module, spec.for_layer(name, is_output))
            new.path = name
            return new.train(module.training).to(device)

        replace_modules(part, dict.fromkeys(SIMULATED, made))
    return net


def _check_modules(part: nn.Module) -> None:
    """TypeError where a module has hooks, which would be lost, or weights that are not float32."""
    for name, module in part.named_modules():
        if type(module) in SIMULATED:
            check_no_hooks(name, module)
        if isinstance(module, Fused):
            for param_name, param in module.named_parameters():
                if param.dtype != torch.float32:
                    raise TypeError(
                        f"prepare: {name}.{param_name} is of type {param.dtype}, and quantization "
                        "takes float32; call float() on the network first"
                    )


def replace_modules(
    net: nn.Module, makers: Mapping[type[nn.Module], Callable[[str, Any], nn.Module]]
) -> None:
    """Replace each module with the result of `makers[type(module)](name, module)`.

    A module that stands in several places stays one. Where a maker raises, the network stays as it
    was.
    """
    made: dict[nn.Module, nn.Module] = {}
    places: dict[str, nn.Module] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        if type(module) in makers:
            if module not in made:
                made[module] = makers[type(module)](name, module)
            places[name] = made[module]
    for name, replacement in places.items():
        net.set_submodule(name, replacement)


def is_prepared(net: nn.Module) -> bool:
    """Return whether a network has fake quantizers."""
    return any(isinstance(module, FakeQuant) for module in net.modules())


def freeze(net: nn.Module, frozen: bool = True) -> None:
    """Freeze all ranges and batch norm statistics, or unfreeze them."""
    for module in net.modules():
        if isinstance(module, FakeQuant | SimulatedLayer):
            module.frozen = frozen


def enable(net: nn.Module, enabled: bool = True) -> None:
    """Turn rounding on or off. Without rounding, a prepared network computes as in float."""
    for module in net.modules():
        if isinstance(module, FakeQuant):
            module.enabled = enabled


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set all ranges from the float network's activations for these inputs, without training.

    ValueError: there are no inputs, they are not finite, or a fake quantizer saw nothing of them.
    TypeError: the network does something with its activations that integers cannot follow.
    """
    quants = [module for module in net.modules() if isinstance(module, FakeQuant)]
    net.eval()
    enable(net, False)
    for quant in quants:
        quant.train()
    first = None  # batch
    for inputs in batches:
        refuse_non_finite(inputs)
        first = inputs if first is None else first
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
    if first is not None:  # what integers cannot follow is said now
        for part in _parts(net):
            part(first)
    return net


def _parts(net: nn.Module) -> list[nn.Module]:
    """The networks that are quantized on their own: the members of an ensemble, or all of it."""
    return [net.current, *net.members] if isinstance(net, Ensemble) else [net]


def _simulated_layer(fused: Fused, spec: QuantSpec) -> SimulatedLayer:
    is_gaussian = isinstance(fused.layer, GaussianWeight)
    return (SimulatedGaussianLayer if is_gaussian else SimulatedPointLayer)(fused, spec)


ROUNDED = (Fused, Enter, Add, Pool)  # what an override can name
SIMULATED: dict[type[nn.Module], Callable[[Any, QuantSpec], Any]] = {
    Fused: _simulated_layer,
    Enter: lambda _, spec: SimulatedEnter(spec),
    Add: lambda _, spec: SimulatedAdd(spec),
    Pool: lambda _, spec: SimulatedPool(spec),
    MCDropout: lambda dropout, _: SimulatedDropout(dropout.rate),
    Leave: lambda _, __: SimulatedLeave(),
}


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
