"""Fake-quantized modules, which simulate an int8 network in float.

With gradients enabled, layers compute with floats that are rounded to the quantization grids. In
evaluation without gradients, each layer sums products of integers exactly, in floats of sufficient
precision, and rounds as the int8 operators do. The results are then bit-equal to those of the
int8 network.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.layers.bayes import GaussianWeight, local_reparametrization
from bqnn.layers.draws import correlated_noise
from bqnn.layers.dropout import MCDropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.finite import refuse_non_finite
from bqnn.layers.linear_map import linear_map
from bqnn.layers.markers import Add, AvgPool, Cat, Enter, Leave, Pool
from bqnn.layers.moments import (
    Moments,
    Rule,
    WithMoments,
    linear_moments,
    rectified,
    refuse_correlated,
    rule_of,
)
from bqnn.layers.swap import check_no_hooks
from bqnn.quant.engines import engine, usable_engine
from bqnn.quant.engines.contract import (
    ActivationGrid,
    Engine,
    Layer,
    check_inputs,
    in_batch,
    layout,
    region_inputs,
)
from bqnn.quant.engines.rounding import (
    as_floats,
    exact_sums,
    from_integers,
    fused_sum,
    plain_sum,
    pooled,
    requantize,
    sum_within_layer,
)
from bqnn.quant.fake_quant import FakeQuant
from bqnn.quant.fuse import Fused, activated, check_features
from bqnn.quant.grids import Grid, OnGrid, grid_of, plain
from bqnn.quant.postponed import (
    Activation,
    Postponed,
    in_one_kernel,
    layers_before_sums,
    rounded,
)
from bqnn.quant.region import check_region
from bqnn.quant.spec import QuantSpec, check_symmetry
from bqnn.quant.stochastic import GaussianGrids, activation_fake_quant, weight_fake_quant

log = logging.getLogger(__name__)


class OutputOnGrid(WithMoments):
    """Mixin: rounds the outputs of a module to a grid, and requires inputs on a grid.

    In a single pass (`bqnn.inference.moments`), only the means are rounded.

    Attributes:
        engine: The engine of the network, which rounds.
    """

    path = ""  # the name of the module in the network

    def __init__(self, spec: QuantSpec) -> None:
        nn.Module.__init__(self)  # the next class in the MRO may require arguments
        self.output_quant = activation_fake_quant(spec)
        self.engine: Engine = usable_engine(spec.engine)

    def grids_of(self, *inputs: Tensor) -> list[Grid] | None:
        """Return the grids of the inputs, or None if rounding is disabled or the call is traced.

        Raises:
            TypeError: An input has no grid.
        """
        if not self.output_quant.enabled or torch.compiler.is_compiling():
            return None
        grids = [grid for grid in map(grid_of, inputs) if grid is not None]
        if len(grids) < len(inputs):
            raise TypeError(
                f"{self.path or type(self).__name__} reads an input that is not quantized: it is "
                "outside the integer region, or an operation before it computes in float; put an "
                "Enter before it (bqnn.layers.markers)"
            )
        return grids

    def rounded(self, x: Tensor) -> Tensor:
        """Round outputs to their grid, and attach the grid."""
        return self.on_grid(self.output_quant(x))

    def moment_rule(self) -> Rule:
        rule = self.unrounded_moment_rule()

        def rounded(*inputs: Moments) -> Moments:
            out = rule(*inputs)
            return out._replace(mean=self.output_quant(out.mean))

        return rounded

    def unrounded_moment_rule(self) -> Rule:
        """Return the rule of the module without the rounding of its outputs."""
        raise NotImplementedError

    def on_grid(self, x: Tensor) -> Tensor:
        """Attach the grid to outputs that are already rounded; not in a traced graph."""
        quant = self.output_quant
        if not quant.enabled or torch.compiler.is_compiling():
            return x
        grid = Grid(float(quant.scale), int(quant.zero_point), quant.largest, self.path)
        return OnGrid.of(x, grid)


class SimulatedLayer(OutputOnGrid):
    """Base class for fused layers whose weights and outputs are rounded to grids.

    Batch norm is folded into the weights before they are rounded, as in the int8 network. While
    batch norm learns its statistics, the output is divided by the folded factor again and then
    normalized, so that training includes the rounding and batch norm sees its usual inputs
    (Krishnamoorthi, arXiv 1806.08342, figure 8). If `frozen` is set, the statistics stay fixed.

    Args:
        fused: The layer in float.
        spec: Bit widths and ranges.
    """

    def __init__(self, fused: Fused, spec: QuantSpec) -> None:
        OutputOnGrid.__init__(self, spec)
        self.bias: Any = fused.layer.bias
        self.bn = fused.bn
        if spec.bias_correction and self.bias is None and self.bn is None:
            weight = next(fused.layer.parameters())
            self.bias = nn.Parameter(weight.new_zeros(len(weight)))
        self.relu = fused.relu
        self.cap = fused.cap
        self.geometry = fused.geometry
        self.is_output = fused.is_output
        self.executor = self.engine  # of this layer; `reference` where sums would saturate
        self.feeds_sum = False  # whether only a residual sum reads the outputs
        self.frozen = False

    @property
    def is_postponed(self) -> bool:
        """Whether the sum that reads the outputs runs the layer, in one kernel."""
        return self.feeds_sum and self.executor.adds_within_layers

    def forward(self, x: Tensor) -> Activation:
        if not self.is_postponed:
            return self.rounded_output(x)
        self.rows_of(x)
        return Postponed(self, x)

    def rows_of(self, x: Tensor) -> Tensor:
        """Return inputs as floats [N, F] or [B, C, H, W], after a check of their shape."""
        check_inputs(x.shape, self.weight_shape, self.geometry, self.path)
        if self.bn is not None:
            check_features(x, self.bn)
        return in_batch(plain(x), is_conv=self.geometry is not None)

    def rounded_output(self, x: Tensor) -> Tensor:
        """Compute the outputs, rounded to the grid of the layer."""
        grids, rows = self.grids_of(x), self.rows_of(x)
        if grids is None or self.training or torch.is_grad_enabled():
            out = self.output_quant(self.before_rounding(rows))
        else:
            out = self.executed(rows, grids[0])
        return self.on_grid(_with_leading_dims(out, x))

    def executed(self, x: Tensor, grid: Grid) -> Tensor:
        """Compute the output of the int8 layer for inputs [N, F] or [B, C, H, W] on a grid."""
        output = ActivationGrid.of(self.output_quant)
        steps = requantize(
            self.sums(x, grid),
            grid.scale,
            self.weight_grid.scale,
            self.fold()[1],
            output,
            relu=self.relu,
            rounding=self.executor.rounding(self.kernel(grid.zero_point), x.shape),
        )
        return from_integers(steps, output.scale)

    def sums(self, x: Tensor, grid: Grid) -> Tensor:
        """Compute the sums of products of integers for inputs [N, F] or [B, C, H, W] on a grid."""
        weight = self.weight_steps(self.fold()[0])
        return exact_sums((x / grid.scale).round_(), weight, self.geometry, grid.largest)

    def before_sum(self, x: Tensor) -> Tensor:
        """Compute the outputs as floats, and let the observer of their grid see them.

        A sum in one kernel does not round them, but other engines do.
        """
        floats = self.before_rounding(self.rows_of(x))
        self.output_quant.watch(floats)
        return _with_leading_dims(floats, x)

    def executed_sum(
        self, x: Tensor, other: Tensor, grids: list[Grid], output: ActivationGrid, relu: bool
    ) -> Tensor:
        """Compute the steps of the sum that the int8 layer rounds.

        Args:
            x: Inputs of the layer.
            other: The other summand, shaped like the outputs of the layer.
            grids: Their grids.
            output: The grid of the sum.
            relu: Whether a ReLU follows the sum.
        """
        rows, (grid, of_other) = self.rows_of(x), grids
        kernel = self.kernel_of_sum(grid.zero_point, of_other.zero_point, output, relu)
        rounding = self.executor.rounding(kernel, rows.shape)
        floats = as_floats(
            self.sums(rows, grid), grid.scale, self.weight_grid.scale, self.fold()[1], rounding
        )
        floats = _with_leading_dims(floats, x)
        summand = (other / of_other.scale).round_(), of_other.scale, of_other.zero_point
        return sum_within_layer(floats, summand, output, relu=relu)

    def kernel(self, input_zero_point: int = 0) -> Layer:
        """Return the properties by which an engine selects the kernel of this layer."""
        weight = self.weight_grid
        # A recipe is compared with a checkpoint on the meta device, which has no values.
        of_weight, of_output = (
            quant.zero_point.is_meta or not bool(quant.zero_point.any())
            for quant in (weight, self.output_quant)
        )
        return Layer(
            self.weight_shape,
            self.geometry,
            per_channel=weight.channels is not None,
            has_bias=self.bias is not None or self.bn is not None,
            relu=self.relu,
            is_zero=(of_weight, input_zero_point == 0, of_output),
        )

    def kernel_of_sum(
        self, input_zero_point: int, other_zero_point: int, output: ActivationGrid, relu: bool
    ) -> Layer:
        """Return the properties by which an engine selects the kernel of this layer and a sum."""
        layer = self.kernel(input_zero_point)
        return layer._replace(
            relu=relu,
            is_zero=(*layer.is_zero[:2], output.zero_point == 0),
            other_is_zero=other_zero_point == 0,
        )

    def before_rounding(self, x: Tensor) -> Tensor:
        """Compute the outputs before `output_quant` rounds them."""
        if self.bn is not None and self.training and not self.frozen:
            factor = _nonzero(self.fold()[0])
            out = self.apply_weights(x, factor, None)
            out = out / _like_outputs(factor, out)
            out = self.bn(out if self.bias is None else out + _like_outputs(self.bias, out))
        else:
            out = self.apply_weights(x, *self.fold())
        return activated(out, self.cap) if self.relu else out

    def fold(self) -> tuple[Tensor | None, Tensor | None]:
        """Fold batch norm into the weights and the bias.

        Returns:
            The factor gamma / sqrt(var + eps) on the weights [C], None without batch norm, and
            the folded bias [C].
        """
        if self.bn is None:
            return None, self.bias
        assert self.bn.running_var is not None
        assert self.bn.running_mean is not None
        factor = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
        mean = self.bn.running_mean
        return factor, self.bn.bias + ((0 if self.bias is None else self.bias) - mean) * factor

    @property
    def weight_grid(self) -> FakeQuant:
        """The grid of the weights that predictions use."""
        raise NotImplementedError

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weights."""
        raise NotImplementedError

    def weight_or_mean(self) -> tuple[Tensor, FakeQuant | None]:
        """Return the weights, or their means, and the grid that rounds them, if there is one."""
        raise NotImplementedError

    def rounded_weight(self, factor: Tensor | None) -> Tensor:
        """Return the weights times `factor` [C] per output channel, rounded to their grid."""
        raise NotImplementedError

    def weight_steps(self, factor: Tensor | None) -> Tensor:
        """Return the integers of the rounded weights minus their zero points, in float32."""
        weight, quant = self.rounded_weight(factor), self.weight_grid
        return (weight / quant.along(weight, quant.scale)).round_()

    def apply_weights(self, x: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
        """Apply the linear map with rounded weights, times `factor` [C] per output channel."""
        return self.linear_map(x, self.rounded_weight(factor), bias)

    def unrounded_moment_rule(self) -> Rule:
        factor, bias = self.fold()
        layer = linear_moments(*self.weight_moments(factor), bias, self.geometry)
        return (lambda x: rectified(layer(x), self.cap)) if self.relu else layer

    def weight_moments(self, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return means of the weights times `factor` [C], and their variances, None for points."""
        return self.rounded_weight(factor), None

    def linear_map(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the linear map with the given weights."""
        return linear_map(x, _laid_out_as(x, weight), bias, self.geometry)

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


class SimulatedPointLayer(SimulatedLayer):
    """A linear layer or convolution with point-valued weights."""

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

    def weight_or_mean(self) -> tuple[Tensor, FakeQuant | None]:
        return self.weight, self.weight_quant

    def rounded_weight(self, factor: Tensor | None) -> Tensor:
        return self.weight_quant(self.folded_weight(factor))

    def folded_weight(self, factor: Tensor | None) -> Tensor:
        """Return the weights times `factor` [C] per output channel."""
        return self.weight if factor is None else self.weight * FakeQuant.along(self.weight, factor)


class SimulatedGaussianLayer(SimulatedLayer, GaussianWeight):  # type: ignore[misc]  # forward
    """A Bayesian layer: local reparametrization in training, weights drawn in evaluation."""

    def __init__(self, fused: Fused, spec: QuantSpec) -> None:
        SimulatedLayer.__init__(self, fused, spec)
        assert isinstance(fused.layer, GaussianWeight)
        self.mean = fused.layer.mean
        self.rho = fused.layer.rho
        self.prior_std = fused.layer.prior_std
        self.register_buffer("loadings", fused.layer.loadings)
        self.grids = GaussianGrids(spec, len(self.mean))

    @property
    def weight_grid(self) -> FakeQuant:
        return self.grids.weight

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape)

    def weight_or_mean(self) -> tuple[Tensor, FakeQuant | None]:
        return self.mean, self.grids.mean

    def rounded_weight(self, factor: Tensor | None) -> Tensor:
        return self.weights()  # draw() has already folded batch norm

    def apply_weights(self, x: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
        if not self.training:
            return super().apply_weights(x, factor, bias)
        mean, sigma = self.grids.parameters_on_grid(*self.folded_parameters(factor))
        if factor is None:
            return self.sample_outputs(x, mean, sigma, bias)
        sign = factor.sign()  # equal noise then gives the same draw as in the float network
        bias = None if bias is None else bias * sign
        out = self.sample_outputs(x, mean * FakeQuant.along(mean, sign), sigma, bias)
        return out * _like_outputs(sign, out)

    def sample_outputs(self, x: Tensor, mean: Tensor, sigma: Tensor, bias: Tensor | None) -> Tensor:
        """Sample the outputs for weights N(mean, sigma^2) by local reparametrization."""
        mean = _laid_out_as(x, mean)
        return local_reparametrization(x, mean, sigma.square(), bias, self.geometry)

    def draw(self) -> Tensor:
        """Draw the weights with batch norm folded in, rounded to their grid."""
        factor, _ = self.fold()
        parameters = self.grids.parameters_on_grid(*self.folded_parameters(factor))
        eps = correlated_noise(self.mean, self.loadings)
        if factor is not None:  # equal noise then gives the same draw as in the float network
            eps *= FakeQuant.along(eps, factor.sign())
        return self.grids.draw(*parameters, eps)

    def mean_draw(self) -> Tensor:
        """Return the draw without noise."""
        factor, _ = self.fold()
        mean, _ = self.grids.parameters_on_grid(*self.folded_parameters(factor))
        return self.grids.weight.round(mean)

    def weight_moments(self, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
        refuse_correlated(self)
        mean, sigma = self.grids.parameters_on_grid(*self.folded_parameters(factor))
        return mean, sigma.square()

    def folded_parameters(self, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mu * factor and sigma * |factor|, which fold batch norm."""
        if factor is None:
            return self.mean, self.sigma
        factor = FakeQuant.along(self.mean, factor)
        return self.mean * factor, self.sigma * factor.abs()


class SimulatedEnter(OutputOnGrid, Enter):
    """Rounds the inputs of the network."""

    def forward(self, x: Tensor) -> Tensor:
        if grid_of(x) is not None:
            raise TypeError(
                f"{self.path} is an Enter inside the integer region; remove it, or put a Leave "
                "before it"
            )
        x = region_inputs(x, self.path)
        is_traced = torch.compiler.is_compiling()
        if not self.training and not torch.is_grad_enabled() and not is_traced:
            refuse_non_finite(x)
        return self.rounded(x)

    def unrounded_moment_rule(self) -> Rule:
        return lambda x: x


class SimulatedLeave(Leave):
    """Returns floats without a grid, contiguous as those of int8."""

    def forward(self, x: Tensor) -> Tensor:
        return plain(x).contiguous()


class SimulatedAdd(OutputOnGrid, Add):
    """Residual sum, rounded."""

    def __init__(self, add: Add, spec: QuantSpec) -> None:
        OutputOnGrid.__init__(self, spec)
        self.relu = add.relu

    def forward(self, x: Activation, y: Activation) -> Tensor:
        together = in_one_kernel(x, y)
        return self.plain_sum(rounded(x), rounded(y)) if together is None else self.fused(*together)

    def fused(self, postponed: Postponed, other: Tensor) -> Tensor:
        """Compute the sum of the output of a layer, which is not rounded, and an activation."""
        layer, x = postponed.layer, postponed.x
        assert isinstance(layer, SimulatedLayer)
        grids, other = self.grids_of(x, other), plain(other)
        if grids is None or self.training or torch.is_grad_enabled():
            return self.rounded(super().forward(layer.before_sum(x), other))
        output = ActivationGrid.of(self.output_quant)
        steps = layer.executed_sum(plain(x), other, grids, output, self.relu)
        return self.on_grid(from_integers(steps, output.scale))

    def plain_sum(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the sum of two activations."""
        grids = self.grids_of(x, y)
        x, y = plain(x), plain(y)
        if grids is None or self.training or torch.is_grad_enabled():
            return self.rounded(super().forward(x, y))
        scale, zero_point, quant_max = ActivationGrid.of(self.output_quant)
        summands = [
            ((floats / grid.scale).round_(), grid.scale, grid.zero_point)
            for floats, grid in zip((x, y), grids, strict=True)
        ]
        rounded_sum = fused_sum if self.engine.fuses_sums else plain_sum
        steps = rounded_sum(summands[0], summands[1], scale)
        steps.clamp_(0 if self.relu else -zero_point, quant_max - zero_point)
        return self.on_grid(from_integers(steps, scale))

    def unrounded_moment_rule(self) -> Rule:
        return rule_of(Add(self.relu))


class SimulatedPool(OutputOnGrid, Pool):
    """Global average pooling of integers in float, rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        grids = self.grids_of(x)
        if grids is None or self.training or torch.is_grad_enabled():
            return self.rounded(super().forward(plain(x)))
        scale = grids[0].scale
        return self.rounded(pooled((plain(x) / scale).round_(), scale, super().forward))

    def unrounded_moment_rule(self) -> Rule:
        return rule_of(Pool())


class SimulatedAvgPool(OutputOnGrid, AvgPool):
    """Average pooling of integers in float, rounded once."""

    def __init__(self, marker: AvgPool, spec: QuantSpec) -> None:
        OutputOnGrid.__init__(self, spec)
        self.pool = marker.pool

    def forward(self, x: Tensor) -> Tensor:
        grids = self.grids_of(x)
        if grids is None or self.training or torch.is_grad_enabled():
            return self.rounded(super().forward(plain(x)))
        scale = grids[0].scale
        return self.rounded(pooled((plain(x) / scale).round_(), scale, self.pool))

    def unrounded_moment_rule(self) -> Rule:
        return rule_of(self.pool)


class SimulatedCat(OutputOnGrid, Cat):
    """Concatenation of activations, rounded to one grid."""

    def __init__(self, cat: Cat, spec: QuantSpec) -> None:
        OutputOnGrid.__init__(self, spec)
        self.dim = cat.dim

    def forward(self, *inputs: Tensor) -> Tensor:
        grids = self.grids_of(*inputs)
        values = [plain(x) for x in inputs]
        if grids is not None and not torch.is_grad_enabled():
            steps = [(x / grid.scale).round_() for x, grid in zip(values, grids, strict=True)]
            values = [from_integers(x, g.scale) for x, g in zip(steps, grids, strict=True)]
        return self.rounded(super().forward(*values))

    def unrounded_moment_rule(self) -> Rule:
        return rule_of(Cat(self.dim))


class SimulatedDropout(MCDropout):
    """MC dropout on a grid: the factor 1 / (1 - rate) multiplies the scale of the grid."""

    def forward(self, x: Tensor) -> Tensor:
        grid = grid_of(x)
        out = super().forward(plain(x))
        if grid is None:
            return out
        return OnGrid.of(out, grid._replace(scale=grid.scale * (1 / (1 - self.rate))))


def prepare(net: nn.Module, spec: QuantSpec) -> nn.Module:
    """Insert fake quantizers into a fused network, in place.

    Each member of an ensemble gets its own fake quantizers.

    Args:
        net: A fused network. It stays unchanged when an error is raised.
        spec: Bit widths and ranges.

    Returns:
        The network.

    Raises:
        ValueError: The network is not fused, has no `Enter` or no `Leave`, an override of the spec
            matches no layer.
        TypeError: An operation between `Enter` and `Leave` cannot run in int8, a layer is outside
            that region, has hooks, or its weights are not float32.

    Examples:
        >>> from bqnn.quant.fuse import fuse
        >>> net = nn.Sequential(Enter(), nn.Linear(3, 2), nn.ReLU(), Leave())
        >>> net = prepare(fuse(net), QuantSpec(weight_bits=4))
        >>> type(net[1]), net[1].weight_quant.bits
        (<class 'bqnn.quant.simulated.SimulatedPointLayer'>, 4)
    """
    if not any(isinstance(module, Fused) for module in net.modules()):
        raise ValueError("prepare: the network has no fused layer; call fuse() on it first")
    check_region(parts(net)[0])  # the members of an ensemble have equal structure
    before_sums = layers_before_sums(parts(net)[0])
    for part in parts(net):
        _check_modules(part)
    for part in parts(net):
        device = next(part.parameters()).device
        found = [(name, m) for name, m in part.named_modules() if type(m) in SIMULATED]
        spec.check_overrides([name for name, module in found if type(module) in ROUNDED])

        def made(name: str, module: nn.Module, device: torch.device = device) -> nn.Module:
            is_output = isinstance(module, Fused) and module.is_output
            new = SIMULATED[type(module)](module, spec.for_layer(name, is_output))
            new.path = name
            new.feeds_sum = name in before_sums
            return new.train(module.training).to(device)

        replace_modules(part, dict.fromkeys(SIMULATED, made))
    use_engine(net, spec.engine)
    return net


def use_engine(net: nn.Module, name: str) -> None:
    """Let a prepared network round like an engine, or like `reference` where it would saturate.

    Args:
        net: A prepared network.
        name: The name of the engine.

    Raises:
        ValueError: The engine does not support the network's weights.
    """
    activation_bits = max(
        (
            module.output_quant.bits
            for module in net.modules()
            if isinstance(module, OutputOnGrid)
            # No layer reads the outputs of the network.
            and not (isinstance(module, SimulatedLayer) and module.is_output)
        ),
        default=0,
    )
    chosen = usable_engine(name)
    for module in net.modules():
        if isinstance(module, SimulatedLayer):
            zero_point = module.weight_grid.zero_point
            check_symmetry(chosen.name, zero_point.is_meta or not zero_point.any())
    exact: list[tuple[str, SimulatedLayer]] = []
    for path, module in net.named_modules():
        if isinstance(module, OutputOnGrid):
            module.engine = chosen
        if isinstance(module, SimulatedLayer):
            module.executor = chosen
            if chosen.can_be_wrong(module.kernel(), module.weight_grid.bits, activation_bits):
                module.executor = engine("reference")
                exact.append((path, module))
    if exact:
        path, layer = exact[0]
        log.warning(
            "%d layers (the first is %s) run on the engine reference, which is slower: with "
            "%d-bit weights and %d-bit activations, sums of the engine %s would be wrong on this "
            "CPU%s",
            len(exact),
            path,
            layer.weight_grid.bits,
            activation_bits,
            chosen.name,
            "; activation_bits=7 avoids it" if activation_bits == 8 else "",
        )


def _check_modules(part: nn.Module) -> None:
    """Raise a TypeError if a module has hooks, or weights that are not float32."""
    for name, module in part.named_modules():
        if type(module) in SIMULATED:
            check_no_hooks(name, module)
        if isinstance(module, Fused):
            for param_name, param in module.named_parameters():
                if param.dtype != torch.float32:
                    raise TypeError(
                        f"prepare: {name}.{param_name} has dtype {param.dtype}, but quantization "
                        "requires float32; call float() on the network first"
                    )


def replace_modules(
    net: nn.Module, makers: Mapping[type[nn.Module], Callable[[str, Any], nn.Module]]
) -> None:
    """Replace each module by the result of `makers[type(module)](name, module)`, in place.

    A module that is used in several places stays one module.

    Args:
        net: The network. It stays unchanged when a maker raises an error.
        makers: For each type, a function of the name and the module.

    Examples:
        >>> net = nn.Sequential(nn.ReLU())
        >>> replace_modules(net, {nn.ReLU: lambda name, relu: nn.Tanh()})
        >>> net[0]
        Tanh()
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


def parts(net: nn.Module) -> list[nn.Module]:
    """Return the parts with their own grids: an ensemble's networks, or the network itself."""
    return [net.current, *net.members] if isinstance(net, Ensemble) else [net]


def is_prepared(net: nn.Module) -> bool:
    """Return whether a network has fake quantizers."""
    return any(isinstance(module, FakeQuant) for module in net.modules())


def freeze(net: nn.Module, frozen: bool = True) -> None:
    """Freeze all ranges and batch norm statistics, or unfreeze them.

    Args:
        net: A prepared network.
        frozen: False unfreezes.
    """
    for module in net.modules():
        if isinstance(module, FakeQuant | SimulatedLayer):
            module.frozen = frozen


def renew(net: nn.Module) -> None:
    """Let the next batch set the ranges that minimize the squared error of activations.

    In a training, these ranges stay from one call to the next.

    Args:
        net: A prepared network.
    """
    for module in net.modules():
        if isinstance(module, FakeQuant):
            module.is_due = True


def enable(net: nn.Module, enabled: bool = True) -> None:
    """Enable or disable rounding. Without rounding, a prepared network computes as in float.

    Args:
        net: A prepared network.
        enabled: False disables rounding.
    """
    for module in net.modules():
        if isinstance(module, FakeQuant):
            module.enabled = enabled


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set all ranges from the activations of the float network, without training.

    Args:
        net: A prepared network. It moves to evaluation mode.
        batches: Inputs [B, ...] of the network.

    Returns:
        The network.

    Raises:
        ValueError: There are no inputs, they are not finite, or a fake quantizer received no data.
        TypeError: The network uses an operation that cannot run in int8.

    Examples:
        >>> from bqnn.quant.fuse import fuse
        >>> net = nn.Sequential(Enter(), nn.Linear(3, 2), nn.ReLU(), Leave())
        >>> net = calibrate(prepare(fuse(net), QuantSpec()), [torch.randn(8, 3)])
        >>> net(torch.randn(4, 3)).shape
        torch.Size([4, 2])
    """
    quants = [module for module in net.modules() if isinstance(module, FakeQuant)]
    net.eval()
    enable(net, False)
    for quant in quants:
        quant.train()
    first = None  # the first batch
    for inputs in batches:
        refuse_non_finite(inputs)
        first = inputs if first is None else first
        for part in parts(net):
            part(inputs)
    for quant in quants:
        quant.eval()
        quant.settle()
    enable(net)
    for name, module in net.named_modules():
        if isinstance(module, FakeQuant) and not module.has_range:
            raise ValueError(
                f"calibrate: {name} has no range, because it has seen no data; pass at least one "
                "batch that reaches every layer"
            )
    if first is not None:  # raises the error of an operation that cannot run in int8
        for part in parts(net):
            part(first)
    return net


def _simulated_layer(fused: Fused, spec: QuantSpec) -> SimulatedLayer:
    is_gaussian = isinstance(fused.layer, GaussianWeight)
    return (SimulatedGaussianLayer if is_gaussian else SimulatedPointLayer)(fused, spec)


ROUNDED = (Fused, Enter, Add, Pool, AvgPool, Cat)  # the modules that an override can name
SIMULATED: dict[type[nn.Module], Callable[[Any, QuantSpec], Any]] = {
    Fused: _simulated_layer,
    Enter: lambda _, spec: SimulatedEnter(spec),
    Add: SimulatedAdd,
    Pool: lambda _, spec: SimulatedPool(spec),
    AvgPool: SimulatedAvgPool,
    Cat: SimulatedCat,
    MCDropout: lambda dropout, _: SimulatedDropout(dropout.rate, dropout.dims),
    Leave: lambda _, __: SimulatedLeave(),
}


def _nonzero(factor: Tensor | None) -> Tensor:
    """Replace factors near 0 by 1, so that division does not overflow.

    Batch norm is constant there.
    """
    assert factor is not None
    return torch.where(factor.abs() > 1e-12, factor, torch.ones_like(factor))


def _with_leading_dims(out: Tensor, x: Tensor) -> Tensor:
    """Give the outputs [N, C] of a linear layer the leading dimensions of its inputs [..., F]."""
    return out if out.dim() == x.dim() else out.reshape(*x.shape[:-1], out.shape[-1])


def _laid_out_as(x: Tensor, weight: Tensor) -> Tensor:
    """Convert weights to the layout of the inputs; outputs take the layout of the weights."""
    last = torch.channels_last
    return weight.to(memory_format=last) if layout(x) == last else weight


def _like_outputs(values: Tensor, outputs: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (outputs.dim() - 2))
