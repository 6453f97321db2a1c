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

from bqnn.layers.linear_map import linear_map
from bqnn.quant.engines.contract import ActivationGrid, Layer, LayerEngine, Weight, output_shape
from bqnn.quant.engines.rounding import Rounding, in_float32, requantize

log = logging.getLogger(__name__)


class Example(NamedTuple):
    """A sum of products, a bias and scales for which kernels round differently."""

    sums: int
    input_scale: float
    weight_scale: float
    bias: float
    output_scale: float


def rounding_of(
    engine: LayerEngine, layer: Layer, inputs: Sequence[int], candidates: tuple[Rounding, ...]
) -> Rounding:
    """Return the rounding of the kernel that an engine selects.

    Args:
        engine: The engine.
        layer: The properties of the layer.
        inputs: Shape of the inputs, [N, F] or [B, C, H, W].
        candidates: The possible roundings; the first is the most common.
    """
    if len(candidates) == 1:
        return candidates[0]
    return _measured_rounding(engine, layer, tuple(inputs), candidates, torch.get_num_threads())


def saturates(engine: LayerEngine, layer: Layer, weight_bits: int, activation_bits: int) -> bool:
    """Return whether the sums of a layer can saturate on this CPU.

    Without VNNI, the sums of every engine of torch can saturate once two products exceed 16 bits.
    With VNNI, FBGEMM's depthwise convolutions still saturate, and so does oneDNN if the environment
    variable ONEDNN_MAX_CPU_ISA disables VNNI.

    Args:
        engine: The engine.
        layer: The properties of the layer.
        weight_bits: Bit width of the weights.
        activation_bits: Bit width of the inputs.
    """
    if not can_saturate(weight_bits, activation_bits):
        return False
    return not has_vnni() or _is_seen_to_saturate(engine, layer)


def pads_whole_windows(layer: Layer) -> bool:
    """Return whether a depthwise convolution has windows that lie in the padding.

    oneDNN then reads memory that it has not written, if the zero point of the inputs is not 0.
    """
    geometry = layer.geometry
    if geometry is None or geometry.groups == 1 or layer.weight[1] != 1:
        return False
    return any(p >= k for p, k in zip(geometry.padding, layer.weight[2:], strict=True))


def has_vnni() -> bool:
    """Return whether this CPU has VNNI, which sums products of 8-bit integers in 32 bits."""
    return torch.cpu._is_vnni_supported()


def can_saturate(weight_bits: int, activation_bits: int) -> bool:
    """Return whether the sum of two products can exceed 16 bits, which some kernels use.

    Args:
        weight_bits: Bit width of the weights.
        activation_bits: Bit width of the activations.

    Examples:
        >>> can_saturate(8, 7), can_saturate(8, 8)
        (False, True)
    """
    return 2 * (2**activation_bits - 1) * 2 ** (weight_bits - 1) > 32_767


@functools.lru_cache(maxsize=4096)
def _measured_rounding(
    engine: LayerEngine,
    layer: Layer,
    inputs: tuple[int, ...],
    candidates: tuple[Rounding, ...],
    num_threads: int,
) -> Rounding:
    with torch.no_grad():
        left = list(candidates)
        for example in _distinguishing_examples(candidates, layer):
            got = _run(engine, layer, inputs, example)
            left = [way for way in left if torch.equal(got, _expected(layer, inputs, example, way))]
    if not left:
        log.warning(
            "the rounding of this CPU's %s kernel is unknown for inputs %s and weights %s: int8 "
            "can differ from the simulation by one step at rounding ties",
            engine.name,
            inputs,
            layer.weight,
        )
    return left[0] if left else candidates[0]


@functools.lru_cache(maxsize=4096)
def _is_seen_to_saturate(engine: LayerEngine, layer: Layer) -> bool:
    """Return whether the kernel computes wrong sums of the largest products."""
    geometry = layer.geometry
    inputs: tuple[int, ...] = (16, layer.weight[1])
    if geometry is not None:
        sides = zip(geometry.dilation, layer.weight[2:], strict=True)
        reach = [max(8, dilation * (size - 1) + 1) for dilation, size in sides]
        inputs = (2, layer.weight[1] * geometry.groups, *reach)
    layer = layer._replace(has_bias=False, relu=False, is_zero=(layer.is_zero[0], True, True))
    with torch.no_grad():
        weight = torch.full(layer.weight, 126.0, device="cpu")
        x = torch.full(inputs, 255.0, device="cpu").double()
        sums = linear_map(x, weight.double(), None, geometry)
        example = Example(255, 1.0, 1.0, 0.0, float(sums.max()) / 200)
        got = _run(engine, layer, inputs, example, weight)
    return bool(((sums / example.output_scale - got).abs() > 1).any())


@functools.lru_cache(maxsize=64)
def _found_examples(
    candidates: tuple[Rounding, ...], is_conv: bool, has_bias: bool, offset: int
) -> tuple[Example, ...]:
    """Search two or more examples for every pair of roundings."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    sums = torch.arange(1.0, 128.0, device="cpu").view((-1, 1, 1, 1) if is_conv else (-1, 1))
    wanted = {(a, b): 2 for i, a in enumerate(candidates) for b in candidates[i + 1 :]}
    found: list[Example] = []
    for _ in range(10_000):
        s_x, s_w, share = torch.rand(3, generator=generator, device="cpu").add_(0.1).tolist()
        steps = float(torch.randint(1, 64, (1,), generator=generator, device="cpu"))
        bias = s_x * s_w * (steps + 1e-6 * share) if has_bias else 0.0
        scales = torch.full((1,), s_w, device="cpu")
        output = ActivationGrid(in_float32(s_x * s_w * 2), offset, 255)
        shift = torch.tensor([bias], device="cpu") if has_bias else None
        integers = [
            requantize(sums, s_x, scales, shift, output, relu=False, rounding=way).flatten()
            for way in candidates
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
    return _found_examples(candidates, layer.geometry is not None, layer.has_bias, offset)


def _expected(layer: Layer, inputs: tuple[int, ...], example: Example, way: Rounding) -> Tensor:
    """Return the integers of a layer with one nonzero weight, for a rounding."""
    x = torch.full((1, *inputs[1:]), float(example.sums), device="cpu")
    sums = linear_map(x, _one_tap(layer), None, layer.geometry)
    weight, output = _weight(layer, example, _one_tap(layer)), _output(layer, example)
    steps = requantize(
        sums,
        example.input_scale,
        weight.scale,
        weight.bias,
        output,
        relu=layer.relu,
        rounding=way,
    )
    return steps.add_(output.zero_point).expand(inputs[0], *sums.shape[1:])


def _run(
    engine: LayerEngine,
    layer: Layer,
    inputs: tuple[int, ...],
    example: Example,
    weight: Tensor | None = None,
) -> Tensor:
    """Return the integers of the kernel for constant inputs; the default weight is `_one_tap`."""
    packed = engine.pack(_weight(layer, example, _one_tap(layer) if weight is None else weight))
    zero_point = 0 if layer.is_zero[1] else 1
    largest = min(255, example.sums + zero_point)
    integers = torch.full(inputs, largest, dtype=torch.uint8, device="cpu")
    x = engine.wrap(integers, example.input_scale, zero_point)
    output = _output(layer, example)
    if layer.other_is_zero is None:
        return engine.integers(packed(x, layer.relu, output)).float()
    nothing = 0 if layer.other_is_zero else 1
    shape = output_shape(inputs, layer.weight, layer.geometry)
    zeros = torch.full(shape, nothing, dtype=torch.uint8, device="cpu")
    other = engine.wrap(zeros, example.input_scale, nothing)
    return engine.integers(packed.add(x, other, layer.relu, output)).float()


def _one_tap(layer: Layer) -> Tensor:
    """Return weights that are 1 in the center of each filter's first channel, and 0 elsewhere."""
    weight = torch.zeros(layer.weight, device="cpu")
    middle: Any = tuple(size // 2 for size in layer.weight[2:])
    weight[(slice(None), 0, *middle)] = 1
    return weight


def _weight(layer: Layer, example: Example, steps: Tensor) -> Weight:
    """Return the weights of a layer, from their steps from the zero point."""
    count = layer.weight[0] if layer.per_channel else 1
    zero_point = 0 if layer.is_zero[0] else 1
    bias = torch.full(layer.weight[:1], example.bias, device="cpu") if layer.has_bias else None
    return Weight(
        (steps + zero_point).to(torch.int8),
        torch.full((count,), example.weight_scale, device="cpu"),
        torch.full((count,), zero_point, dtype=torch.int32, device="cpu"),
        bias,
        layer.geometry,
    )


def _output(layer: Layer, example: Example) -> ActivationGrid:
    return ActivationGrid(in_float32(example.output_scale), 0 if layer.is_zero[2] else 1, 255)
