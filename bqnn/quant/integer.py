"""Integer modules, and `convert`, which turns a fake-quantized network into an int8 network."""

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.arguments import ArgumentError
from bqnn.layers.draws import DrawnWeights, Stochastic, correlated_noise
from bqnn.layers.dropout import MCDropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.finite import refuse_non_finite
from bqnn.layers.markers import Add, Cat, Pool, Quantized
from bqnn.quant.engines import usable_engine
from bqnn.quant.engines.contract import (
    ActivationGrid,
    Engine,
    IntegerOutput,
    LayerEngine,
    NetworkEngine,
    Packed,
    Weight,
    check_inputs,
    region_inputs,
)
from bqnn.quant.engines.plain import max_pool
from bqnn.quant.engines.reference import ExactLayer
from bqnn.quant.engines.rounding import from_integers, pooled
from bqnn.quant.fake_quant import FakeQuant
from bqnn.quant.grids import UNTRACED
from bqnn.quant.postponed import Activation, Postponed, in_one_kernel, rounded
from bqnn.quant.simulated import (
    SimulatedAdd,
    SimulatedAvgPool,
    SimulatedCat,
    SimulatedDropout,
    SimulatedEnter,
    SimulatedGaussianLayer,
    SimulatedLayer,
    SimulatedLeave,
    SimulatedPointLayer,
    SimulatedPool,
    replace_modules,
    use_engine,
)
from bqnn.quant.spec import ENGINES
from bqnn.quant.summary import check_agreement

log = logging.getLogger(__name__)


class IntegerLayer(IntegerOutput):
    """Base class for layers in integers.

    Args:
        layer: The simulated layer.
        engine: The engine of the network.
    """

    def __init__(self, layer: SimulatedLayer, engine: LayerEngine) -> None:
        super().__init__()
        self.engine = engine
        self.path = layer.path
        self.grid = ActivationGrid.of(layer.output_quant)
        self.relu = layer.relu
        self.geometry = layer.geometry
        self.weight_shape = layer.weight_shape
        self.is_postponed = layer.is_postponed

    # A traced graph cannot hold packed weights.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Activation:
        check_inputs(x.shape, self.weight_shape, self.geometry, self.path)
        return Postponed(self, x) if self.is_postponed else self.rounded_output(x)

    def rounded_output(self, x: Tensor) -> Tensor:
        """Compute the outputs on the grid of the layer."""
        return self.weights()(x, self.relu, self.grid)

    def weights(self) -> Packed:
        """Return the packed weights."""
        raise NotImplementedError


class IntegerPointLayer(IntegerLayer):
    """A point-valued layer whose integer weights are packed once."""

    def __init__(self, layer: SimulatedPointLayer, engine: LayerEngine) -> None:
        super().__init__(layer, engine)
        factor, bias = layer.fold()
        quant = layer.weight_quant
        integers = quant.integers(layer.folded_weight(factor))
        weight = Weight(integers, quant.scale, quant.zero_point, bias, layer.geometry)
        self.packed = _packed(weight, layer.executor, engine)

    def weights(self) -> Packed:
        return self.packed


def _packed(weight: Weight, executor: Engine, engine: LayerEngine) -> Packed:
    """Pack weights for an engine, or with exact sums if its own would saturate."""
    is_exact = executor.name == "reference" != engine.name
    return ExactLayer(weight, engine) if is_exact else engine.pack(weight)


class IntegerGaussianLayer(DrawnWeights, IntegerLayer):
    """A Bayesian layer with integers for mu and sigma; each draw of the weights is packed."""

    def __init__(self, layer: SimulatedGaussianLayer, engine: LayerEngine) -> None:
        IntegerLayer.__init__(self, layer, engine)
        self.executor = layer.executor
        factor, bias = layer.fold()
        self.bias = None if bias is None else bias.detach()
        self.sign = None if factor is None else FakeQuant.along(layer.mean, factor.sign())
        mean, sigma = layer.folded_parameters(factor)
        self.grids = grids = layer.grids
        self.mean = mean.detach() if grids.mean is None else grids.mean.integers(mean)
        self.sigma = sigma if grids.sigma is None else grids.sigma.integers(sigma)
        self.loadings = layer.loadings

    def draw(self) -> Packed:
        """Draw the weights and pack them."""
        grids = self.grids
        mean = self.mean if grids.mean is None else grids.mean.dequantize(self.mean)
        sigma = self.sigma if grids.sigma is None else grids.sigma.dequantize(self.sigma)
        eps = correlated_noise(mean, self.loadings)
        if self.sign is not None:
            eps *= self.sign
        quant, integers = grids.weight, grids.draw_integers(mean, sigma, eps)
        weight = Weight(integers, quant.scale, quant.zero_point, self.bias, self.geometry)
        return _packed(weight, self.executor, self.engine)


class IntegerDropout(Stochastic):
    """Exact dropout on integers: dropped values become the zero point, the factor is in the scale.

    The scale of the outputs is that of the inputs times 1 / (1 - rate).
    """

    def __init__(self, dropout: MCDropout, engine: LayerEngine) -> None:
        super().__init__()
        self.engine = engine
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        if self.dropout.rate == 0:
            return x
        if not self.engine.holds(x):  # outside of the integers
            dropped: Tensor = self.dropout(x)
            return dropped
        kept = self.dropout.kept(self.engine.integers(x))
        return self.engine.keep(x, kept, 1 / (1 - self.dropout.rate))


class IntegerEnter(Quantized, IntegerOutput):
    """Quantizes the inputs of the network. Raises a ValueError if a value is not finite."""

    def __init__(self, enter: SimulatedEnter, engine: LayerEngine) -> None:
        super().__init__()
        self.engine = engine
        self.path = enter.path
        self.grid = ActivationGrid.of(enter.output_quant)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise TypeError(UNTRACED)
        x = region_inputs(x, self.path)
        refuse_non_finite(x)
        return self.engine.quantize(x, self.grid)


class IntegerLeave(nn.Module):
    """Dequantizes the outputs of the network.

    They are contiguous, because the float operations that follow may depend on the memory layout.
    """

    def __init__(self, engine: LayerEngine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, x: Tensor) -> Tensor:
        return self.engine.dequantize(x).contiguous()


class IntegerAdd(Add, IntegerOutput):
    """Residual sum."""

    def __init__(self, add: SimulatedAdd, engine: LayerEngine) -> None:
        super().__init__(add.relu)
        self.engine = engine
        self.grid = ActivationGrid.of(add.output_quant)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Activation, y: Activation) -> Tensor:
        together = in_one_kernel(x, y)
        if together is None:
            return self.engine.add(rounded(x), rounded(y), self.grid, self.relu)
        postponed, other = together
        assert isinstance(postponed.layer, IntegerLayer)
        return postponed.layer.weights().add(postponed.x, other, self.relu, self.grid)


class IntegerAverage(IntegerOutput):
    """Average pooling of integers in float, rounded once."""

    def __init__(self, pool: SimulatedPool | SimulatedAvgPool, engine: LayerEngine) -> None:
        super().__init__()
        self.engine = engine
        self.grid = ActivationGrid.of(pool.output_quant)
        self.pool = pool.pool if isinstance(pool, SimulatedAvgPool) else Pool()

    def forward(self, x: Tensor) -> Tensor:
        scale, _ = self.engine.grid(x)
        means = pooled(self.engine.centered(x), scale, self.pool)
        return self.engine.quantize(means, self.grid)


class IntegerMaxPool(nn.MaxPool2d):
    """Max pooling of integers, several times as fast as torch's of quantized tensors."""

    def __init__(self, pool: nn.MaxPool2d, engine: LayerEngine) -> None:
        super().__init__(
            pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode
        )
        self.engine = engine

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        if not self.engine.holds(x):  # outside of the integers
            return super().forward(x)
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return self.engine.moved(x, lambda integers: max_pool(integers, *sizes))


class IntegerCat(Cat, IntegerOutput):
    """Concatenation of activations, each requantized to one grid."""

    def __init__(self, cat: SimulatedCat, engine: LayerEngine) -> None:
        super().__init__(cat.dim)
        self.engine = engine
        self.grid = ActivationGrid.of(cat.output_quant)

    def forward(self, *inputs: Tensor) -> Tensor:
        floats = [from_integers(self.engine.centered(x), self.engine.grid(x)[0]) for x in inputs]
        return self.engine.quantize(super().forward(*floats), self.grid)


@torch.no_grad()
def convert(
    net: nn.Module,
    engine: str | None = None,
    *,
    probe: Tensor | None = None,
) -> nn.Module:
    """Convert a prepared network to int8, in place, unless its engine runs networks as a whole.

    The network moves to the CPU and to evaluation mode.

    Args:
        net: A network that was prepared, and then trained or calibrated.
        engine: One of `bqnn.quant.spec.ENGINES`; None for the one that the network was prepared
            for.
        probe: Inputs [B, ...] on which every layer is compared with its simulation. A difference
            of one step logs a warning; a larger one raises a ValueError.

    Returns:
        The int8 network.

    Raises:
        ValueError: There is nothing to convert, a fake quantizer has seen no data, or the
            comparison with the simulation fails.
        TypeError: The network cannot run in int8 on `probe`.

    Examples:
        >>> from bqnn.layers.markers import Enter, Leave
        >>> from bqnn.quant.fuse import fuse
        >>> from bqnn.quant.simulated import calibrate, prepare
        >>> from bqnn.quant.spec import QuantSpec
        >>> net = nn.Sequential(Enter(), nn.Linear(3, 2), nn.ReLU(), Leave())
        >>> net = calibrate(prepare(fuse(net), QuantSpec()), [torch.randn(8, 3)])
        >>> type(convert(net, "fbgemm")[1])
        <class 'bqnn.quant.integer.IntegerPointLayer'>
    """
    unseen = [n for n, m in net.named_modules() if isinstance(m, FakeQuant) and not m.has_range]
    is_ensemble = isinstance(net, Ensemble) and len(net) > 0
    unseen = [name for name in unseen if not (is_ensemble and name.startswith("current."))]
    if unseen:
        raise ValueError(
            f"convert: {unseen[0]} has no range, because it has seen no data; train or calibrate "
            "the prepared network"
        )
    layers = [module for module in net.modules() if isinstance(module, SimulatedLayer)]
    if not layers:
        raise ValueError("convert: the network has no fake-quantized layer; call prepare() first")
    if engine is not None and engine not in ENGINES:
        raise ArgumentError(f"engine={engine}: choose {' or '.join(ENGINES)}", "engine")
    prepared = layers[0].engine
    if engine is not None and usable_engine(engine) is not prepared:
        log.warning(
            "convert: the engine is %s, but the simulation rounds like %s: integers can differ by "
            "one step; prepare the network with QuantSpec(engine=%r)",
            engine,
            prepared.name,
            engine,
        )
        use_engine(net, engine)
    chosen = layers[0].engine
    net.eval().cpu()
    simulated = None if probe is None else deepcopy(net)
    if isinstance(chosen, NetworkEngine):
        net = chosen.network(net)
    elif isinstance(net, Ensemble) and is_ensemble:
        for member in net.members:
            _replace_by_integers(member, chosen)
        net.current = nn.Identity()  # it runs only in training, or without members
    else:
        _replace_by_integers(net, chosen)
    net.eval()
    if simulated is not None and probe is not None:
        with torch.random.fork_rng(devices=[]):
            check_agreement(simulated, net, probe)
    return net


def _max_pool(pool: nn.MaxPool2d, engine: LayerEngine) -> nn.Module:
    return pool if pool.return_indices else IntegerMaxPool(pool, engine)


def _replace_by_integers(net: nn.Module, engine: Engine) -> None:
    assert isinstance(engine, LayerEngine)
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # off in training mode, too: torch cannot drop integers
    kinds: dict[type[nn.Module], Callable[[Any, LayerEngine], nn.Module]] = {
        SimulatedPointLayer: IntegerPointLayer,
        SimulatedGaussianLayer: IntegerGaussianLayer,
        SimulatedEnter: IntegerEnter,
        SimulatedAdd: IntegerAdd,
        SimulatedPool: IntegerAverage,
        SimulatedAvgPool: IntegerAverage,
        SimulatedCat: IntegerCat,
        SimulatedDropout: IntegerDropout,
        nn.MaxPool2d: _max_pool,
        SimulatedLeave: lambda _, engine: IntegerLeave(engine),
    }
    replace_modules(
        net,
        {
            kind: lambda _, module, make=make: make(module, engine)  # type: ignore[misc]
            for kind, make in kinds.items()
        },
    )
