"""Measure how the int8 kernels of this CPU round, and whether they saturate.

An engine selects a kernel by the CPU, by environment variables and by the shapes of a layer, and
offers no way to query it. Kernels apply scales in different orders, which matters at rounding
ties, and some sum pairs of products in 16 bits. Each shape is therefore run once, on numbers for
which the kernels give different results.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bqnn.layers.linear_map import Geometry, linear_map
from bqnn.quant import fbgemm
from bqnn.quant.fbgemm import (
    FakeQuant,
    PackedWeight,
    Rounding,
    make_fake_quant,
    quantized_activation,
    quantized_weight,
    requantize,
)

log = logging.getLogger(__name__)


class Layer(NamedTuple):
    """The properties of a layer that select a kernel, besides the input shape.

    Attributes:
        engine: fbgemm, x86 or onednn.
        weight: Shape of the weights.
        geometry: Geometry of the convolution; None for a linear layer.
        per_channel: Whether each output channel has its own scale.
        has_bias: Whether there is a bias.
        relu: Whether the kernel applies a ReLU.
        is_zero: Whether the zero points of weights, inputs and outputs are zero.
    """

    engine: str
    weight: tuple[int, ...]
    geometry: Geometry | None
    per_channel: bool
    has_bias: bool
    relu: bool
    is_zero: tuple[bool, bool, bool]


class Example(NamedTuple):
    """A sum of products, a bias and scales for which kernels round differently."""

    sums: int
    input_scale: float
    weight_scale: float
    bias: float
    output_scale: float


def rounding_of(layer: Layer, inputs: Sequence[int]) -> Rounding:
    """Return the rounding of the kernel that the engine selects.

    Args:
        layer: The properties of the layer.
        inputs: Shape of the inputs, [N, F] or [B, C, H, W].
    """
    if len(_candidates(layer)) == 1:
        return _candidates(layer)[0]
    return _measured_rounding(layer, tuple(inputs), torch.get_num_threads())


def saturates(layer: Layer, weight_bits: int, activation_bits: int) -> bool:
    """Return whether the sums of a layer can saturate on this CPU.

    Without VNNI, the sums of every engine can saturate once two products exceed 16 bits. With
    VNNI, FBGEMM's depthwise convolutions still saturate, and so does oneDNN if the environment
    variable ONEDNN_MAX_CPU_ISA disables VNNI.

    Args:
        layer: The properties of the layer.
        weight_bits: Bit width of the weights.
        activation_bits: Bit width of the inputs.
    """
    if not fbgemm.can_saturate(weight_bits, activation_bits):
        return False
    return not fbgemm.has_vnni() or _is_seen_to_saturate(layer)


def _candidates(layer: Layer) -> tuple[Rounding, ...]:
    """Return the possible roundings of the layer's engine; the first is the most common."""
    fused: tuple[Rounding, ...] = ("fbgemm",)
    if layer.has_bias and not layer.per_channel:
        fused = ("fbgemm_fused", "fbgemm")
    onednn: tuple[Rounding, ...] = ("onednn", "onednn_product")
    return {"fbgemm": fused, "onednn": onednn, "x86": (*onednn, *fused)}[layer.engine]


@functools.lru_cache(maxsize=4096)
def _measured_rounding(layer: Layer, inputs: tuple[int, ...], num_threads: int) -> Rounding:
    candidates = _candidates(layer)
    with torch.device("cpu"), torch.no_grad():
        left = list(candidates)
        for example in _distinguishing_examples(candidates, layer):
            got = _run(layer, inputs, example)
            left = [way for way in left if torch.equal(got, _expected(layer, inputs, example, way))]
    if not left:
        log.warning(
            "the rounding of this CPU's %s kernel is unknown for inputs %s and weights %s: int8 "
            "can differ from the simulation by one step at rounding ties",
            layer.engine,
            inputs,
            layer.weight,
        )
    return left[0] if left else candidates[0]


@functools.lru_cache(maxsize=4096)
def _is_seen_to_saturate(layer: Layer) -> bool:
    """Return whether the kernel computes wrong sums of the largest products."""
    geometry = layer.geometry
    inputs: tuple[int, ...] = (16, layer.weight[1])
    if geometry is not None:
        sides = zip(geometry.dilation, layer.weight[2:], strict=True)
        reach = [max(8, dilation * (size - 1) + 1) for dilation, size in sides]
        inputs = (2, layer.weight[1] * geometry.groups, *reach)
    layer = layer._replace(has_bias=False, relu=False, is_zero=(layer.is_zero[0], True, True))
    with torch.device("cpu"), torch.no_grad():
        weight = torch.full(layer.weight, 126.0)
        x = torch.full(inputs, 255.0).double()
        sums = linear_map(x, weight.double(), None, geometry)
        example = Example(255, 1.0, 1.0, 0.0, float(sums.max()) / 200)
        got = _run(layer, inputs, example, weight)
    return bool(((sums / example.output_scale - got).abs() > 1).any())


@functools.lru_cache(maxsize=64)
def _found_examples(
    candidates: tuple[Rounding, ...], is_conv: bool, per_channel: bool, has_bias: bool, offset: int
) -> tuple[Example, ...]:
    """Search two or more examples for every pair of roundings."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    sums = torch.arange(1.0, 128.0).view((-1, 1, 1, 1) if is_conv else (-1, 1))
    wanted = {(a, b): 2 for i, a in enumerate(candidates) for b in candidates[i + 1 :]}
    found: list[Example] = []
    for _ in range(10_000):
        s_x, s_w, share = torch.rand(3, generator=generator).add_(0.1).tolist()
        steps = float(torch.randint(1, 64, (1,), generator=generator))
        bias = s_x * s_w * (steps + 1e-6 * share) if has_bias else 0.0
        weight, output = _quants(1 if per_channel else None, s_w, s_x * s_w * 2, (0, offset))
        shift = torch.tensor([bias]) if has_bias else None
        integers = [
            requantize(sums, s_x, weight, shift, output, False, way).flatten() for way in candidates
        ]
        for (a, b), count in wanted.items():
            differ = (integers[candidates.index(a)] != integers[candidates.index(b)]).nonzero()
            if count > 0 and len(differ):
                found.append(Example(int(differ[0]) + 1, s_x, s_w, bias, s_x * s_w * 2))
                wanted[a, b] -= 1
        if not any(wanted.values()):
            break
    return tuple(found)


def _distinguishing_examples(candidates: tuple[Rounding, ...], layer: Layer) -> tuple[Example, ...]:
    offset = 0 if layer.is_zero[2] else 1
    is_conv = layer.geometry is not None
    return _found_examples(candidates, is_conv, layer.per_channel, layer.has_bias, offset)


def _expected(layer: Layer, inputs: tuple[int, ...], example: Example, way: Rounding) -> Tensor:
    """Return the integers of a layer with one nonzero weight, for a rounding."""
    x = torch.full((1, *inputs[1:]), float(example.sums))
    sums = linear_map(x, _one_tap(layer), None, layer.geometry)
    weight, output = _grids(layer, example)
    shift = _bias(layer, example)
    out = requantize(sums, example.input_scale, weight, shift, output, layer.relu, way)
    return (out / output.scale).round_().add_(output.zero_point).expand(inputs[0], *sums.shape[1:])


def _run(
    layer: Layer, inputs: tuple[int, ...], example: Example, weight: Tensor | None = None
) -> Tensor:
    """Return the integers of the kernel for constant inputs; the default weight is `_one_tap`."""
    quant, output = _grids(layer, example)
    weight = (_one_tap(layer) if weight is None else weight) * example.weight_scale
    packed = PackedWeight(
        quantized_weight(weight, quant), _bias(layer, example), layer.geometry, layer.engine
    )
    scale, zero_point = example.input_scale, 0 if layer.is_zero[1] else 1
    x = quantized_activation(torch.full(inputs, example.sums * scale), scale, zero_point)
    out = packed(x, layer.relu, float(output.scale), int(output.zero_point))
    return out.int_repr().float()


def _one_tap(layer: Layer) -> Tensor:
    """Return weights that are 1 in the center of each filter's first channel, and 0 elsewhere."""
    weight = torch.zeros(layer.weight)
    middle: Any = tuple(size // 2 for size in layer.weight[2:])
    weight[(slice(None), 0, *middle)] = 1
    return weight


def _bias(layer: Layer, example: Example) -> Tensor | None:
    return torch.full(layer.weight[:1], example.bias) if layer.has_bias else None


def _grids(layer: Layer, example: Example) -> tuple[FakeQuant, FakeQuant]:
    zero_points = (0 if layer.is_zero[0] else 1, 0 if layer.is_zero[2] else 1)
    channels = layer.weight[0] if layer.per_channel else None
    return _quants(channels, example.weight_scale, example.output_scale, zero_points)


def _quants(
    channels: int | None, weight_scale: float, output_scale: float, zero_points: tuple[int, int]
) -> tuple[FakeQuant, FakeQuant]:
    """Return the grids of weights and outputs."""
    weight = make_fake_quant(8, signed=True, channels=channels)
    output = make_fake_quant(8, signed=False)
    for quant, scale, zero_point in zip(
        (weight, output), (weight_scale, output_scale), zero_points, strict=True
    ):
        quant.scale.fill_(scale)
        quant.zero_point.fill_(zero_point)
    return weight, output
