"""One call from a network of plain torch to int8: quantize, and prepare_qat for training."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.arguments import ArgumentError, ArgumentTypeError, required
from bqnn.layers.markers import Quantized
from bqnn.layers.noise import reseed
from bqnn.layers.swap import check_no_loose_tensors
from bqnn.quant.fuse import fuse
from bqnn.quant.integer import convert
from bqnn.quant.mark import Keep, entries, mark
from bqnn.quant.reconstruction import calibrate_by
from bqnn.quant.simulated import prepare
from bqnn.quant.spec import QuantSpec
from bqnn.quant.stochastic import check_rounding
from bqnn.seeds import Stream, stream_seed
from bqnn.text import short, type_of

PROBE_ROWS = 4  # rows on which int8 is compared with its simulation


def quantize(
    net: nn.Module,
    batches: Iterable[Any],
    spec: QuantSpec | None = None,
    *,
    keep: Keep = (),
) -> nn.Module:
    """Quantize a trained network to int8, without training.

    A copy of the network is traced, fused, calibrated and converted. Everything from its first
    linear layer or convolution to its last runs in integers. On a few rows, each layer is compared
    with its simulation.

    Args:
        net: The network, with point-valued or Bayesian layers. It stays as it is.
        batches: Batches to calibrate with: inputs [B, ...], or tuples that begin with them, as a
            DataLoader yields.
        spec: Bit widths, ranges and engine. The default has 8-bit weights, 7-bit activations, and
            ranges that minimize the squared error over a histogram.
        keep: Types of modules, and globs over the names of modules, that stay in float with all
            that they contain, in addition to those of the spec.

    Returns:
        The int8 network, on the CPU and in evaluation mode.

    Raises:
        ValueError: There is nothing to quantize or to calibrate with, or inputs are not finite.
        TypeError: An operation cannot run in integers. The message names it.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> quantized = quantize(net, [torch.randn(16, 3)])
        >>> quantized(torch.randn(4, 3)).shape
        torch.Size([4, 2])
    """
    if spec is None:
        spec = QuantSpec(activation_observer="histogram")
    simulated = _prepared(net, spec, keep, trains=False)
    _check_one_input(net)
    inputs = _inputs(batches, next(simulated.parameters()).device)
    first = next(inputs, None)
    if first is None:
        raise ArgumentError("batches: it is empty; give at least one batch of inputs", "batches")
    with torch.random.fork_rng(devices=[]):  # stochastic layers draw during calibration
        reseed(torch.device("cpu"), stream_seed(0, Stream.CALIBRATION))
        calibrate_by(spec, simulated, chain([first], inputs))
    return convert(simulated, probe=first[:PROBE_ROWS].cpu())


def prepare_qat(
    net: nn.Module,
    spec: QuantSpec | None = None,
    *,
    keep: Keep = (),
) -> nn.Module:
    """Prepare a network for quantization-aware training.

    A copy of the network is traced and fused, and its weights and activations are rounded in every
    forward pass. Train it as usual, then call `bqnn.quant.integer.convert`.

    Args:
        net: The network, with point-valued or Bayesian layers. It stays as it is.
        spec: Bit widths, ranges and engine; the default is `QuantSpec()`.
        keep: Types of modules, and globs over the names of modules, that stay in float with all
            that they contain, in addition to those of the spec.

    Returns:
        The network to train. Create the optimizer from its parameters.

    Raises:
        ValueError: There is nothing to quantize, or an option of the spec supports only
            calibration.
        TypeError: An operation cannot run in integers. The message names it.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> simulated = prepare_qat(net, QuantSpec(weight_bits=4)).train()
        >>> simulated(torch.randn(16, 3)).sum().backward()  # ... a training
        >>> quantized = convert(simulated)
    """
    spec = QuantSpec() if spec is None else spec
    simulated = _prepared(net, spec, keep, trains=True)
    return simulated


def _prepared(net: nn.Module, spec: QuantSpec, keep: Keep, trains: bool) -> nn.Module:
    """Return a prepared copy of a network."""
    if not isinstance(net, nn.Module):
        raise ArgumentTypeError(f"net={short(net)} is not an nn.Module; give the network", "net")
    if not isinstance(spec, QuantSpec):
        raise ArgumentTypeError(
            f"spec={short(spec)} is not a QuantSpec; give QuantSpec(...)", "spec"
        )
    if any(isinstance(module, Quantized) for module in net.modules()):
        raise ArgumentError("net: it is quantized already; give the network in float", "net")
    wrapped = "module" if isinstance(net, nn.DataParallel) else "_orig_mod"  # of torch.compile
    if wrapped in net._modules:
        raise ArgumentTypeError(
            f"net is a {type(net).__name__}, which wraps the network; give net.{wrapped}", "net"
        )
    if trains:
        spec.check_trainable()
    check_no_loose_tensors(net)
    check_rounding(net, spec)
    kept = [*spec.keep, *entries(keep)]
    return prepare(fuse(mark(deepcopy(net), keep=kept, trains=trains)), spec)


def _check_one_input(net: nn.Module) -> None:
    """Raise an ArgumentTypeError if `forward` needs more than the first entry of a batch."""
    needed = required(net.forward)
    if len(needed) > 1:
        names = ", ".join(name for name in signature(net.forward).parameters if name in needed)
        raise ArgumentTypeError(
            f"net: its forward needs {len(needed)} inputs ({names}), and quantize passes the first "
            "entry of each batch; give the others defaults, or call prepare_qat(net), then the "
            "result in training mode on your inputs, then convert",
            "net",
        )


def _inputs(batches: Iterable[Any], device: torch.device) -> Iterator[Tensor]:
    """Yield the inputs of each batch, on a device."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise ArgumentTypeError(
            f"batches is {type_of(batches)}; give a list of batches, such as [inputs], or "
            "a DataLoader",
            "batches",
        )
    for batch in batches:
        inputs = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(inputs, Tensor) or inputs.dim() == 0:
            raise ArgumentTypeError(
                f"batches: a batch is {short(inputs)}; give tensors of inputs [B, ...], or tuples "
                "that begin with one",
                "batches",
            )
        yield inputs.to(device)
