"""Integer modules, and `convert`, which turns a fake-quantized network into an int8 network."""

import logging
from copy import deepcopy

import torch
from torch import Tensor, nn

from bqnn.layers.draws import DrawnWeights, Stochastic, evaluation_noise
from bqnn.layers.dropout import MCDropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.finite import refuse_non_finite
from bqnn.layers.markers import Add, AvgPool, Cat, Pool, Quantized
from bqnn.quant.fbgemm import (
    ActivationGrid,
    FakeQuant,
    PackedWeight,
    add,
    centered,
    from_integers,
    keep_scaled,
    pooled,
    quantized_weight,
)
from bqnn.quant.grids import UNTRACED
from bqnn.quant.saturation import refuse_saturation
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
)
from bqnn.quant.summary import check_agreement

log = logging.getLogger(__name__)


class IntegerLayer(nn.Module):
    """A point-valued layer whose integer weights are packed once."""

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
    """A Bayesian layer with integers for mu and sigma; each draw of the weights is packed."""

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
        """Draw the weights and pack them."""
        grids = self.grids
        mean = self.mean if grids.mean is None else grids.mean.dequantize(self.mean)
        sigma = self.sigma if grids.sigma is None else grids.sigma.dequantize(self.sigma)
        eps = evaluation_noise(mean)
        if self.sign is not None:
            eps *= self.sign
        weight = grids.draw(mean, sigma, eps)
        packed = quantized_weight(weight, grids.weight)
        return PackedWeight(packed, self.bias, self.geometry, self.engine)

    # A traced graph cannot hold packed weights.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        out = self.weights()(x, self.relu, self.grid.scale, self.grid.zero_point)
        return self.grid.clamp(out)


class IntegerDropout(Stochastic):
    """Exact dropout on integers: dropped values become the zero point, the factor is in the scale.

    The scale of the outputs is that of the inputs times 1 / (1 - rate).
    """

    def __init__(self, dropout: MCDropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        if self.dropout.rate == 0:
            return x
        return keep_scaled(x, self.dropout.kept(x), 1 / (1 - self.dropout.rate))


class IntegerEnter(Quantized):
    """Quantizes the inputs of the network. Raises a ValueError if a value is not finite."""

    def __init__(self, enter: SimulatedEnter) -> None:
        super().__init__()
        self.grid = ActivationGrid(enter.output_quant)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise TypeError(UNTRACED)
        refuse_non_finite(x)
        return self.grid.quantize(x)


class IntegerLeave(nn.Module):
    """Dequantizes the outputs of the network.

    They are contiguous, because the float operations that follow may depend on the memory layout.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.dequantize().contiguous()


class IntegerAdd(Add):
    """Residual sum."""

    def __init__(self, add: SimulatedAdd) -> None:
        super().__init__(add.relu)
        self.grid = ActivationGrid(add.output_quant)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return add(x, y, self.grid, self.relu)


class IntegerPool(Pool):
    """Global average pooling of integers in float, rounded once."""

    def __init__(self, pool: SimulatedPool) -> None:
        super().__init__()
        self.grid = ActivationGrid(pool.output_quant)

    def forward(self, x: Tensor) -> Tensor:
        return self.grid.quantize(pooled(centered(x), x.q_scale(), super().forward))


class IntegerAvgPool(AvgPool):
    """Average pooling of integers in float, rounded once."""

    def __init__(self, pool: SimulatedAvgPool) -> None:
        super().__init__(pool.pool)
        self.grid = ActivationGrid(pool.output_quant)

    def forward(self, x: Tensor) -> Tensor:
        return self.grid.quantize(pooled(centered(x), x.q_scale(), self.pool))


class IntegerCat(Cat):
    """Concatenation of activations, each requantized to one grid."""

    def __init__(self, cat: SimulatedCat) -> None:
        super().__init__(cat.dim)
        self.grid = ActivationGrid(cat.output_quant)

    def forward(self, *inputs: Tensor) -> Tensor:
        floats = [from_integers(centered(x), x.q_scale()) for x in inputs]
        return self.grid.quantize(super().forward(*floats))


@torch.no_grad()
def convert(
    net: nn.Module,
    engine: str | None = None,
    *,
    probe: Tensor | None = None,
    allow_saturation: bool = False,
) -> nn.Module:
    """Convert a prepared network to int8, in place.

    The network moves to the CPU and to evaluation mode.

    Args:
        net: A network that was prepared, and then trained or calibrated.
        engine: fbgemm, x86 or onednn; None for the one that the network was prepared for.
        probe: Inputs [B, ...] on which every layer is compared with its simulation. A difference
            of one step logs a warning; a larger one raises a ValueError.
        allow_saturation: Warn, instead of raising an error, if sums saturate on this CPU or a
            layer differs from its simulation by more than one step.

    Returns:
        The network.

    Raises:
        ValueError: There is nothing to convert, a fake quantizer has seen no data, sums would
            saturate on this CPU, or the comparison with the simulation fails.
        TypeError: The network cannot run in int8 on `probe`.

    Examples:
        >>> from bqnn.layers.markers import Enter, Leave
        >>> from bqnn.quant.fuse import fuse
        >>> from bqnn.quant.simulated import calibrate, prepare
        >>> from bqnn.quant.spec import QuantSpec
        >>> net = nn.Sequential(Enter(), nn.Linear(3, 2), nn.ReLU(), Leave())
        >>> net = calibrate(prepare(fuse(net), QuantSpec()), [torch.randn(8, 3)])
        >>> type(convert(net, "fbgemm")[1])
        <class 'bqnn.quant.integer.IntegerLayer'>
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
    engine = layers[0].engine if engine is None else engine
    if layers[0].engine != engine:
        log.warning(
            "convert: the engine is %s, but the simulation rounds like %s: integers can differ by "
            "one step; prepare the network with QuantSpec(engine=%r)",
            engine,
            layers[0].engine,
            engine,
        )
    refuse_saturation(net, allow_saturation)
    net.eval().cpu()
    simulated = None if probe is None else deepcopy(net)
    if isinstance(net, Ensemble) and is_ensemble:
        for member in net.members:
            _replace_by_integers(member, engine)
        net.current = nn.Identity()  # it runs only in training, or without members
    else:
        _replace_by_integers(net, engine)
    net.eval()
    if simulated is not None and probe is not None:
        with torch.random.fork_rng(devices=[]):
            check_agreement(simulated, net, probe, only_warn=allow_saturation)
    return net


def _replace_by_integers(net: nn.Module, engine: str) -> None:
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # off in training mode, too: torch cannot drop integers
    replace_modules(
        net,
        {
            SimulatedPointLayer: lambda _, layer: IntegerLayer(layer, engine),
            SimulatedGaussianLayer: lambda _, layer: IntegerGaussianLayer(layer, engine),
            SimulatedEnter: lambda _, enter: IntegerEnter(enter),
            SimulatedAdd: lambda _, add: IntegerAdd(add),
            SimulatedPool: lambda _, pool: IntegerPool(pool),
            SimulatedAvgPool: lambda _, pool: IntegerAvgPool(pool),
            SimulatedCat: lambda _, cat: IntegerCat(cat),
            SimulatedDropout: lambda _, dropout: IntegerDropout(dropout),
            SimulatedLeave: lambda _, __: IntegerLeave(),
        },
    )
