"""Summary of a quantized network: integers, sizes, and agreement of int8 with the simulation."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.layers.draws import held_draw
from bqnn.layers.ensemble import Ensemble
from bqnn.quant.engines.contract import IntegerOutput, LayerEngine, WholeNetwork
from bqnn.quant.fake_quant import FakeQuant
from bqnn.quant.grids import plain
from bqnn.quant.postponed import Activation, Postponed
from bqnn.quant.simulated import SimulatedGaussianLayer, SimulatedLayer, SimulatedPointLayer
from bqnn.quant.stochastic import LogFakeQuant
from bqnn.seeds import Stream, stream_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightIntegers:
    """The integers of a weight tensor, and their grid.

    Attributes:
        name: `weight`, `mean` or `sigma`.
        values: The integers, shaped like the weights.
        floats: The values before rounding; for log-spaced levels, sigma itself.
        quant: The grid.
    """

    name: str
    values: Tensor
    floats: Tensor
    quant: FakeQuant

    @property
    def steps(self) -> Tensor:
        """The values before rounding, on the scale of the integers."""
        floats = self.floats.detach()
        quant = self.quant
        return floats / quant.along(floats, quant.scale) + quant.along(floats, quant.zero_point)


def weight_integers(layer: SimulatedLayer) -> list[WeightIntegers]:
    """Return the stored integers of a fake-quantized layer, with batch norm folded in."""
    with torch.no_grad():
        factor, _ = layer.fold()
        if isinstance(layer, SimulatedPointLayer):
            weight, quant = layer.folded_weight(factor), layer.weight_quant
            return [WeightIntegers("weight", quant.integers(weight), weight, quant)]
        assert isinstance(layer, SimulatedGaussianLayer)
        grids, stored = layer.grids, []
        for name, floats in zip(("mean", "sigma"), layer.folded_parameters(factor), strict=True):
            quant = getattr(grids, name)
            if quant is None:  # the strategy `weights` rounds only draws
                if name == "mean":
                    stored.append(
                        WeightIntegers("mean", grids.weight.integers(floats), floats, grids.weight)
                    )
                continue
            grid = quant.exponent if isinstance(quant, LogFakeQuant) else quant
            stored.append(WeightIntegers(name, quant.integers(floats), floats, grid))
        return stored


def simulated_layers(net: nn.Module) -> Iterator[tuple[str, SimulatedLayer]]:
    """Yield the names and fake-quantized layers that predictions use."""
    for name, layer in net.named_modules():
        is_spare = isinstance(net, Ensemble) and len(net) > 0 and name.startswith("current.")
        if isinstance(layer, SimulatedLayer) and not is_spare:
            yield name, layer


def layer_rows(
    net: nn.Module, start: nn.Module, disagreements: dict[str, "Disagreement"]
) -> list[dict[str, Any]]:
    """Return the rows of quantization.csv, one for each weight tensor of a prepared network.

    Args:
        net: The prepared network.
        start: The prepared network before fine-tuning. `moved_share` is the share of weights whose
            integer differs from it. Its grids are replaced by those of `net`.
        disagreements: The results of `check_agreement`.
    """
    rows = []
    for name, layer in simulated_layers(net):
        output = layer.output_quant
        found = disagreements.get(name)
        before = start.get_submodule(name)
        assert isinstance(before, SimulatedLayer)
        _take_grids(before, layer)
        pairs = zip(weight_integers(layer), weight_integers(before), strict=True)
        for weights, were in pairs:
            values, quant = weights.values, weights.quant
            ends = (values == quant.quant_min) | (values == quant.quant_max)
            rows.append(
                {
                    "layer": name,
                    "kind": "linear" if layer.geometry is None else "conv2d",
                    "tensor": weights.name,
                    "shape": "x".join(map(str, values.shape)),
                    "weight_bits": quant.bits,
                    "activation_bits": output.bits,
                    "scale_min": float(quant.scale.min()),
                    "scale_max": float(quant.scale.max()),
                    "zero_point_min": int(quant.zero_point.min()),
                    "zero_point_max": int(quant.zero_point.max()),
                    "integer_min": int(values.min()),
                    "integer_max": int(values.max()),
                    "distinct_integers": len(values.unique()),
                    "moved_share": float((values != were.values).float().mean()),
                    "saturated_share": float(ends.float().mean()),
                    "zero_share": float((weights.quant.dequantize(values) == 0).float().mean()),
                    "output_scale": float(output.scale),
                    "output_zero_point": int(output.zero_point),
                    "engine": layer.executor.name,
                    "differing_share": None if found is None else found.share,
                    "largest_disagreement_steps": None if found is None else found.largest,
                }
            )
    return rows


def sizes(net: nn.Module) -> dict[str, int]:
    """Compute the size of the parameters of a prepared network.

    Integer sizes include scales, zero points, and the biases and loadings in float32. A Gaussian
    weight counts twice, as mu and sigma.

    Returns:
        Bytes in float32 (`float_bytes`), in 8-bit containers (`int8_bytes`), and packed at the
        bit widths of the spec (`packed_bytes`).

    Examples:
        >>> from bqnn.layers.markers import Enter, Leave
        >>> from bqnn.quant.fuse import fuse
        >>> from bqnn.quant.simulated import calibrate, prepare
        >>> from bqnn.quant.spec import QuantSpec
        >>> net = nn.Sequential(Enter(), nn.Linear(100, 10), Leave())
        >>> net = calibrate(prepare(fuse(net), QuantSpec(weight_bits=4)), [torch.randn(8, 100)])
        >>> sizes(net)  # 1000 weights and 10 biases
        {'float_bytes': 4040, 'int8_bytes': 1120, 'packed_bytes': 620}
    """
    total = {"float_bytes": 0, "int8_bytes": 0, "packed_bytes": 0}
    for _, layer in simulated_layers(net):
        loadings = layer.loadings if isinstance(layer, SimulatedGaussianLayer) else None
        floats = 0 if loadings is None else 4 * loadings.numel()
        total["float_bytes"] += sum(4 * param.numel() for param in layer.parameters()) + floats
        _, bias = layer.fold()
        rest = floats + (0 if bias is None else 4 * bias.numel())
        for weights in weight_integers(layer):
            count = weights.values.numel()
            rest += 8 * weights.quant.scale.numel()  # a float32 and an int32
            total["int8_bytes"] += count
            total["packed_bytes"] += ceil(count * weights.quant.bits / 8)
        total["int8_bytes"] += rest
        total["packed_bytes"] += rest
    return total


@dataclass
class Disagreement:
    """The differences between int8 and simulation in the outputs of a module.

    Attributes:
        differing: The number of differing integers.
        total: The number of integers.
        largest: The largest difference, in steps of the output grid.

    Examples:
        >>> Disagreement(differing=1, total=4, largest=1).share
        0.25
    """

    differing: int
    total: int
    largest: int

    @property
    def share(self) -> float:
        """The share of differing integers, from 0 to 1."""
        return self.differing / self.total


def disagreements(
    simulated: nn.Module, integer: nn.Module, x: Tensor, index: int = 0
) -> dict[str, Disagreement]:
    """Compare int8 with the simulation for each module; `twins` describes the arguments.

    A layer that runs within a sum has the differences of the sum.
    """
    results: dict[str, Disagreement] = {}
    names = {module: name for name, module in simulated.named_modules()}
    for twin in twins(simulated, integer, x, index):
        steps = (twin.got - twin.expected).abs()
        found = Disagreement(int((steps > 0).sum()), steps.numel(), int(steps.max()))
        layers = [x.layer for x in twin.inputs if isinstance(x, Postponed)]
        results |= dict.fromkeys([*map(names.__getitem__, layers), twin.name], found)
    return results


@torch.no_grad()
def check_agreement(
    simulated: nn.Module, integer: nn.Module, x: Tensor, *, only_warn: bool = False
) -> dict[str, Disagreement]:
    """Compare every layer and the outputs of an int8 network with its simulation.

    A difference of one step logs a warning, because a CPU with unknown kernels may round ties
    differently.

    Args:
        simulated: The prepared network.
        integer: The int8 network.
        x: Inputs [B, ...].
        only_warn: Log a warning, instead of raising an error, for larger differences, too.

    Returns:
        The differences of each layer, for all members of an ensemble.

    Raises:
        ValueError: Layers differ by more than one step, or only the outputs differ.
        TypeError: The network cannot run in int8.
    """
    found: dict[str, Disagreement] = {}
    for index in range(len(simulated) if isinstance(simulated, Ensemble) and len(simulated) else 1):
        try:
            found |= disagreements(simulated, integer, x, index)
            outputs = [_tensors(_drawn_output(net, x, index)) for net in (simulated, integer)]
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise TypeError(
                f"int8: the network cannot run in integers: {reason}; put a Leave before the float "
                "operation (bqnn.layers.markers)"
            ) from error
        warn_of_differences(found, only_warn)
        are_equal = all(
            map(_are_close if isinstance(integer, WholeNetwork) else torch.equal, *outputs)
        )
        if not any(each.differing for each in found.values()) and not are_equal:
            raise ValueError(
                "int8: every layer computes the simulated integers, but the outputs differ: an "
                "operation between the layers cannot run in integers; put a Leave before it "
                "(bqnn.layers.markers)"
            )
    return found


def _are_close(x: Tensor, y: Tensor) -> bool:
    """Return whether floats agree up to the order of operations in another runtime."""
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-5)


def warn_of_differences(found: dict[str, Disagreement], only_warn: bool = True) -> None:
    """Warn if int8 differs from the simulation.

    Args:
        found: The differences of each layer.
        only_warn: If False, differences of more than one step raise a ValueError.
    """
    differing = {name: each for name, each in found.items() if each.differing > 0}
    if not differing:
        return
    name, worst = max(differing.items(), key=lambda item: item[1].largest)
    message = (
        f"int8 differs from the simulation in {len(differing)} of {len(found)} layers, most in "
        f"{name}: {worst.differing} of {worst.total} integers, by up to {worst.largest} steps"
    )
    if worst.largest > 1 and not only_warn:
        raise ValueError(
            f"{message}; evaluate it with numeric=simulated, or quantize it with another engine"
        )
    log.warning("%s", message)


@dataclass(frozen=True, eq=False)
class Twin:
    """A fake-quantized module and its int8 twin on the same inputs.

    Attributes:
        name: The name of the module in the network.
        module: The fake-quantized module.
        inputs: The inputs of both, as floats.
        expected: The integers of the fake-quantized module.
        got: The integers of the int8 module.
    """

    name: str
    module: nn.Module
    inputs: tuple[Activation, ...]
    expected: Tensor
    got: Tensor


@torch.no_grad()
def twins(simulated: nn.Module, integer: nn.Module, x: Tensor, index: int = 0) -> Iterator[Twin]:
    """Run each module of the int8 network on the inputs of its simulated twin.

    Both networks use one draw, made from equal noise.

    Args:
        simulated: The prepared network.
        integer: The int8 network.
        x: Inputs [B, ...].
        index: The number of the draw.

    Returns:
        An iterator over the modules that the draw used and whose outputs are quantized.
    """
    seen = _record(simulated, x, index, lambda module: hasattr(module, "output_quant"))
    whole = isinstance(integer, WholeNetwork)
    run = _run_whole if whole else _run_modules
    integers = run(integer, x, index, {name: inputs for name, (inputs, _) in seen.items()})
    for name, (inputs, output) in seen.items():
        module = simulated.get_submodule(name)
        quant = module.output_quant
        assert isinstance(quant, FakeQuant)
        expected = quant.integers(plain(output)).int()
        yield Twin(name, module, tuple(map(_plain, inputs)), expected, integers[name].int())


def _plain(x: Activation) -> Activation:
    return x if isinstance(x, Postponed) else plain(x)


Inputs = Mapping[str, tuple[Activation, ...]]


def _run_modules(net: nn.Module, x: Tensor, index: int, inputs: Inputs) -> dict[str, Tensor]:
    """Return the integers of each module of an int8 network on inputs of the simulation."""
    seen = _record(net, x, index, lambda module: isinstance(module, IntegerOutput))
    integers = {}
    with held_draw(net, index, comparison_noise()):
        for name, floats in inputs.items():
            module = net.get_submodule(name)
            assert isinstance(module, IntegerOutput)
            fed = map(partial(_like, module.engine), floats, seen[name][0])
            integers[name] = module.engine.integers(module(*fed))
    return integers


def _like(engine: LayerEngine, x: Activation, like: Activation) -> Activation:
    """Return an activation of the simulation in the form of another one in the int8 network."""
    if isinstance(x, Postponed):
        assert isinstance(like, Postponed)
        return like.on(engine.like(plain(x.x), like.x))
    assert isinstance(like, Tensor)
    return engine.like(plain(x), like) if engine.holds(like) else plain(x)


def _run_whole(net: nn.Module, x: Tensor, index: int, inputs: Inputs) -> dict[str, Tensor]:
    """Return the integers of each module in a network that an engine runs as a whole."""
    assert isinstance(net, WholeNetwork)
    with held_draw(net, index, comparison_noise()):
        return net.integers(x)


def _drawn_output(net: nn.Module, x: Tensor, index: int) -> Any:
    with held_draw(net, index, comparison_noise()):
        return net(x)


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output, which may be nested in tuples, lists and dictionaries."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in _tensors(part)]
    return [output] if isinstance(output, Tensor) else []


def comparison_noise() -> torch.Generator:
    """Create the generator that gives both compared networks the same noise."""
    return torch.Generator().manual_seed(stream_seed(0, Stream.COMPARISON))


def _take_grids(to: nn.Module, source: nn.Module) -> None:
    """Copy the grids of a layer's twin, so that their integers can be compared."""
    for name, module in source.named_modules():
        if isinstance(module, FakeQuant | LogFakeQuant):
            to.get_submodule(name).load_state_dict(module.state_dict())


def _record(
    net: nn.Module, x: Tensor, index: int, wanted: Any
) -> dict[str, tuple[tuple[Activation, ...], Tensor]]:
    """Record the inputs and the output of the wanted modules, in one pass of one draw."""
    kept: dict[str, tuple[tuple[Activation, ...], Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Activation, ...], output: Activation) -> None:
            # Later modules may change a tensor in place, as nn.ReLU(inplace=True) does.
            if not isinstance(output, Postponed):
                kept[name] = (tuple(x.clone() for x in inputs), output.clone())

        return hook

    hooks = [m.register_forward_hook(keep(n)) for n, m in net.named_modules() if wanted(m)]
    try:
        _drawn_output(net, x, index)
    finally:
        for hook in hooks:
            hook.remove()
    return kept
