"""The tensors of a calibrated network whose widths can be chosen, and the network at other widths.

Ranges come from the weights and from the activations in float, so the calibration of a network at
one width has all that the ranges at any other width need.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.layers.ensemble import Ensemble
from bqnn.quant.budget import OUTPUT, OVERRIDDEN
from bqnn.quant.fake_quant import FakeQuant
from bqnn.quant.simulated import (
    OutputOnGrid,
    SimulatedGaussianLayer,
    SimulatedLayer,
    SimulatedPointLayer,
    enable,
)
from bqnn.quant.spec import QuantSpec
from bqnn.quant.stochastic import GaussianGrids, activation_fake_quant, weight_fake_quant
from bqnn.quant.summary import weight_integers


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor of a calibrated network; for an ensemble, that of all members.

    Attributes:
        layer: The name of its module in a member.
        tensor: `weight`, `mean`, `sigma` or `output`.
        counts: The number of stored values in each member, or the number of values in the
            activations of one row.
        modules: The module in each member.
    """

    layer: str
    tensor: str
    counts: list[int]
    modules: list[OutputOnGrid]

    @property
    def values(self) -> int:
        """The number of values."""
        return sum(self.counts)

    def packed_bytes(self, bits: int) -> int:
        """Return the size of the packed values; 0 for activations, which are not stored."""
        return 0 if self.tensor == OUTPUT else sum(ceil(count * bits / 8) for count in self.counts)

    @contextmanager
    def at(self, bits: int, spec: QuantSpec) -> Iterator[None]:
        """Round the tensor to another width within the context.

        Args:
            bits: The width.
            spec: The spec of the network.
        """
        changes: dict[str, Any] = {OVERRIDDEN[self.tensor]: bits}
        changed = replace(spec, **changes)
        before = [_grids(module, self.tensor) for module in self.modules]
        try:
            for module in self.modules:
                _regrid(module, self.tensor, changed)
            yield
        finally:
            for module, (name, grids) in zip(self.modules, before, strict=True):
                setattr(module, name, grids)


def stored_tensors(net: nn.Module) -> list[QuantizedTensor]:
    """List the weights of a calibrated network.

    Examples:
        >>> from bqnn.layers.markers import Enter, Leave
        >>> from bqnn.quant.fuse import fuse
        >>> from bqnn.quant.simulated import calibrate, prepare
        >>> net = nn.Sequential(Enter(), nn.Linear(100, 10), Leave())
        >>> net = calibrate(prepare(fuse(net), QuantSpec()), [torch.randn(8, 100)])
        >>> [(t.layer, t.tensor, t.values, t.packed_bytes(4)) for t in stored_tensors(net)]
        [('1', 'weight', 1000, 500)]
    """
    found: dict[tuple[str, str], QuantizedTensor] = {}
    for member in _members(net):
        for name, module in member.named_modules():
            if not isinstance(module, SimulatedLayer):
                continue
            for weights in weight_integers(module):
                new = QuantizedTensor(name, weights.name, [], [])
                each = found.setdefault((name, weights.name), new)
                each.counts.append(weights.values.numel())
                each.modules.append(module)
    return list(found.values())


@torch.no_grad()
def activation_tensors(net: nn.Module, x: Tensor) -> list[QuantizedTensor]:
    """List the activations of a calibrated network, except for its outputs.

    Args:
        net: The network, in evaluation mode.
        x: Inputs [B, ...], which tell the number of activations.
    """
    counts: dict[str, int] = {}
    first, *_ = members = _members(net)
    modules = {
        name: module
        for name, module in first.named_modules()
        if isinstance(module, OutputOnGrid)
        and not (isinstance(module, SimulatedLayer) and module.is_output)
    }

    def count(name: str, output: Tensor) -> None:
        counts[name] = output.numel() // len(x)

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: count(name, output))
        for name, module in modules.items()
    ]
    try:
        first(x)
    finally:
        for hook in hooks:
            hook.remove()
    made = []
    for name, number in counts.items():
        of_members = [member.get_submodule(name) for member in members]
        grids = [module for module in of_members if isinstance(module, OutputOnGrid)]
        made.append(QuantizedTensor(name, OUTPUT, [number], grids))
    return made


def _members(net: nn.Module) -> list[nn.Module]:
    """Return the networks that predictions use: the members of an ensemble, or the network."""
    if not isinstance(net, Ensemble):
        return [net]
    return [*net.members] if len(net.members) else [net.current]


def _grids(module: OutputOnGrid, tensor: str) -> tuple[str, nn.Module]:
    """Return the attribute of a module that holds the grids of a tensor, and its value."""
    if tensor == OUTPUT:
        return "output_quant", module.output_quant
    if isinstance(module, SimulatedPointLayer):
        return "weight_quant", module.weight_quant
    assert isinstance(module, SimulatedGaussianLayer)
    return "grids", module.grids


@torch.no_grad()
def _regrid(module: OutputOnGrid, tensor: str, spec: QuantSpec) -> None:
    """Give a module new grids for a tensor, with the ranges of a calibration."""
    device = module.output_quant.scale.device
    if tensor == OUTPUT:
        module.output_quant = _activation_grid(module.output_quant, spec).to(device)
        return
    assert isinstance(module, SimulatedLayer)
    factor, _ = module.fold()
    if isinstance(module, SimulatedPointLayer):
        module.weight_quant = weight_fake_quant(spec, len(module.weight)).to(device)
        module.weight_quant.watch(module.folded_weight(factor))
        module.weight_quant.eval()
        return
    assert isinstance(module, SimulatedGaussianLayer)
    module.grids = GaussianGrids(spec, len(module.mean)).to(device)
    enable(module.grids, False)  # ranges of a calibration are those without rounding
    module.grids.parameters_on_grid(*module.folded_parameters(factor))
    enable(module.grids)
    module.grids.eval()


def _activation_grid(calibrated: FakeQuant, spec: QuantSpec) -> FakeQuant:
    """Return a grid of other bits for the activations that a calibrated one has seen."""
    quant = activation_fake_quant(spec)
    quant.observer = deepcopy(calibrated.observer)
    assert quant.observer is not None
    quant.observer.quant_min, quant.observer.quant_max = quant.quant_min, quant.quant_max
    quant.settle()
    return quant.eval()
