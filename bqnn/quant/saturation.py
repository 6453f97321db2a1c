"""Refuse networks whose int8 sums would saturate on this CPU."""

import logging
from collections.abc import Iterator

from torch import nn

from bqnn.arguments import ArgumentError
from bqnn.layers.ensemble import Ensemble
from bqnn.quant import kernels
from bqnn.quant.simulated import OutputOnGrid, SimulatedLayer

log = logging.getLogger(__name__)


def refuse_saturation(net: nn.Module, allow: bool = False) -> None:
    """Refuse a network whose int8 sums would saturate on this CPU.

    Args:
        net: A simulated network, as `bqnn.quant.simulated.prepare` returns it.
        allow: Warn instead of raising an error. `QuantSpec.allow_saturation` has the same effect.

    Raises:
        ArgumentError: A layer would compute wrong sums with its bits.
    """
    found = list(_saturating(net))
    if not found:
        return
    name, layer, activation_bits = found[0]
    why = (
        f"{len(found)} layers of the network (the first is {name}) would saturate on this CPU: "
        f"with {layer.weight_grid.bits}-bit weights and {activation_bits}-bit activations, the "
        f"engine {layer.engine} sums products in 16 bits here"
    )
    if not (allow or all(layer.allow_saturation for _, layer, _ in found)):
        raise ArgumentError(
            f"int8: {why}; choose activation_bits=7, use a CPU with VNNI, or accept wrong integers "
            "with allow_saturation=true",
            *("activation_bits", "allow_saturation"),
        )
    log.warning("int8 can differ from the simulation: %s", why)


def _saturating(net: nn.Module) -> Iterator[tuple[str, SimulatedLayer, int]]:
    """Yield the layers whose sums can saturate, with the bit width of their inputs."""
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
    part = net.current if isinstance(net, Ensemble) else net  # members have equal layers
    for name, layer in part.named_modules():
        if isinstance(layer, SimulatedLayer) and kernels.saturates(
            layer.kernel(), layer.weight_grid.bits, activation_bits
        ):
            yield name, layer, activation_bits
