"""Exact sums of integers, and the formulas by which engines round them.

A simulation and the engine `reference` use them; other engines have kernels that round in one of
these ways. All operations are in float32 and in the order of the kernel, so that even ties round
equally.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bqnn.layers.linear_map import Geometry, linear_map

# The rounding of a kernel: `requantize` defines it, bqnn/quant/engines/measure.py measures it.
Rounding = Literal[
    "fbgemm",
    "fbgemm_inverse",
    "fbgemm_fused",
    "integer_bias",
    "onednn",
    "onednn_product",
    "onednn_inverse",
    "onednn_inverse_product",
]

EXACT = 2**24  # float32 holds every integer up to here
Summand = tuple[Tensor, float, int]  # integers minus zero point in float32, scale, zero point


def exact_sums(x: Tensor, weight: Tensor, geometry: Geometry | None, largest: int) -> Tensor:
    """Apply a linear map to integers, and round the exact sums at most once, to float32.

    Args:
        x: Integers as floats, |x| <= largest: [N, F] or [B, C, H, W].
        weight: Integers as floats.
        geometry: Geometry of the convolution; None for a linear layer.
        largest: The bound of |x|.

    Examples:
        >>> exact_sums(torch.tensor([[255.0, 255.0]]), torch.tensor([[127.0, 1.0]]), None, 255)
        tensor([[32640.]])
    """
    bound = largest * weight.abs().flatten(1).sum(1).max()
    if bound < EXACT:  # float32 holds every partial sum
        return linear_map(x, weight, None, geometry)
    return linear_map(x.double(), weight.double(), None, geometry).float()


def requantize(
    sums: Tensor,
    input_scale: float,
    weight_scale: Tensor,
    bias: Tensor | None,
    output: tuple[float, int, int],
    *,
    relu: bool,
    rounding: Rounding,
) -> Tensor:
    """Round exact sums of integer products to the grid of the outputs, as a kernel does.

        fbgemm          steps = round((sums + bias / (s_x s_w)) * (s_x s_w / s_y))
        fbgemm_inverse  the same, with bias * (1 / (s_x s_w))
        fbgemm_fused    the same, with a fused multiply-add of the bias and 1 / (s_x s_w)
        integer_bias    the same, with round(bias / (s_x s_w))
        onednn          steps = round((sums * s_x * s_w + bias) * (1 / s_y) + z_y) - z_y
        onednn_product  the same, with sums * (s_x * s_w)
        onednn_inverse  as onednn, with 1 / (1 / s_x) and, in linear layers, 1 / (1 / s_w)
        onednn_inverse_product  as onednn_product, with the same inverses

    Args:
        sums: Sums of products [B, C, ...], integers in float32.
        input_scale: Scale s_x of the inputs.
        weight_scale: Scales s_w of the weights, [C] or, for one grid, [1].
        bias: Bias [C], or None.
        output: Scale s_y, zero point z_y and largest integer of the grid of the outputs.
        relu: Whether the kernel applies a ReLU.
        rounding: The kernel's formula.

    Returns:
        Steps from the zero point [B, C, ...], integers in float32.
    """
    along = (1, -1) + (1,) * (sums.dim() - 2)
    scale, zero_point, quant_max = output
    s_y = sums.new_tensor(scale)
    if rounding.startswith("onednn"):
        steps = as_floats(sums, input_scale, weight_scale, bias, rounding)
        steps.mul_(1 / s_y).add_(zero_point).round_().sub_(zero_point)
    else:
        product = weight_scale * input_scale
        if bias is not None:
            sums = plus_bias(sums, bias.view(along), product.view(along), rounding)
        steps = (sums * (product / s_y).view(along)).round_()
    return steps.clamp_(0 if relu else -zero_point, quant_max - zero_point)


def as_floats(
    sums: Tensor, input_scale: float, weight_scale: Tensor, bias: Tensor | None, rounding: Rounding
) -> Tensor:
    """Return the outputs of a kernel of oneDNN before it rounds them: sums * s_x * s_w + bias.

    Args:
        sums: Sums of products [B, C, ...], integers in float32.
        input_scale: Scale s_x of the inputs.
        weight_scale: Scales s_w of the weights, [C] or [1].
        bias: Bias [C], or None.
        rounding: The kernel's formula.
    """
    along = (1, -1) + (1,) * (sums.dim() - 2)
    s_x, s_w = scales_of_onednn(input_scale, weight_scale, rounding, is_conv=sums.dim() == 4)
    s_w = s_w.view(along)
    floats = sums * (s_x * s_w) if rounding.endswith("product") else sums * s_x * s_w
    return floats if bias is None else floats.add_(bias.view(along))


def sum_within_layer(
    floats: Tensor, other: Summand, output: tuple[float, int, int], *, relu: bool
) -> Tensor:
    """Add activations to the outputs of a layer as a kernel of oneDNN does, and round once.

        steps = round(relu(fma(other, s_other, floats)) * (1 / s_y) + z_y) - z_y

    Args:
        floats: The outputs of the layer before they are rounded, from `as_floats`.
        other: The activations, shaped like `floats`.
        output: Scale s_y, zero point z_y and largest integer of the grid of the sum.
        relu: Whether a ReLU follows the sum.

    Returns:
        Steps from the zero point, integers in float32.
    """
    scale, zero_point, quant_max = output
    centered, other_scale, _ = other
    # The product of two float32 numbers is exact in float64.
    total = (centered.double() * in_float32(other_scale)).add_(floats).float()
    if relu:
        total.clamp_min_(0)
    steps = total.mul_(1 / floats.new_tensor(scale)).add_(zero_point).round_().sub_(zero_point)
    return steps.clamp_(-zero_point, quant_max - zero_point)


def scales_of_onednn(
    input_scale: float, weight_scale: Tensor, rounding: Rounding, *, is_conv: bool
) -> tuple[Tensor, Tensor]:
    """Return the scales of inputs and weights as a kernel of oneDNN reads them.

    torch's operators on quantized tensors pass inverse scales.
    """
    s_x, s_w = weight_scale.new_tensor(input_scale), weight_scale
    if "inverse" in rounding:
        s_x, s_w = 1 / (1 / s_x), s_w if is_conv else 1 / (1 / s_w)
    return s_x, s_w


def plus_bias(sums: Tensor, bias: Tensor, product: Tensor, rounding: Rounding) -> Tensor:
    """Compute sums + bias / product as FBGEMM and ONNX Runtime do.

    Args:
        sums: Sums of products [B, C, ...].
        bias: Bias, which broadcasts over the sums.
        product: The products s_x s_w of the scales, likewise.
        rounding: The formula.
    """
    if rounding == "integer_bias":
        return (sums.double() + integer_bias(bias, product)).float()
    if rounding == "fbgemm":
        return sums + bias / product
    if rounding == "fbgemm_inverse":
        return sums + bias * (1 / product)
    # The product of two float32 numbers is exact in float64.
    return (sums.double() + bias.double() * (1 / product).double()).float()


def integer_bias(bias: Tensor, product: Tensor) -> Tensor:
    """Round a bias to steps of the sums, within the range of int32; in float64."""
    ends = torch.iinfo(torch.int32)
    return (bias.double() / product.double()).round_().clamp_(ends.min, ends.max)


def fused_sum(x: Summand, y: Summand, scale: float) -> Tensor:
    """Compute the steps of x + y as torch's operator on quantized tensors does.

    The operator computes scale * integer - scale * zero_point with a fused multiply-add, which
    rounds once.

    Args:
        x: Activations.
        y: Activations, shaped like `x`.
        scale: The step of the outputs.

    Returns:
        Steps, integers in float32, not clamped.
    """
    total = as_read_for_fused_sum(x) + as_read_for_fused_sum(y)
    return total.mul_(1 / total.new_tensor(scale)).round_()


def as_read_for_fused_sum(x: Summand) -> Tensor:
    """Return activations as the operator of a residual sum on quantized tensors reads them."""
    centered, scale, zero_point = x
    step = centered.new_tensor(scale)  # float32, as in the operator
    offset = (step * zero_point).double()  # the product is exact in float64
    return (centered + zero_point).double().mul_(step.double()).sub_(offset).float()


def plain_sum(x: Summand, y: Summand, scale: float) -> Tensor:
    """Compute the steps of x + y as round(x_steps * (s_x / s) + y_steps * (s_y / s)).

    Args:
        x: Activations, which are overwritten.
        y: Activations, likewise; the shapes may broadcast.
        scale: The step of the outputs.

    Returns:
        Steps, integers in float32, not clamped.

    Examples:
        >>> plain_sum((torch.tensor([3.0]), 0.5, 0), (torch.tensor([1.0]), 1.0, 0), scale=0.5)
        tensor([5.])
    """
    first, second = (each[0].mul_(summand_factor(each[1], scale)) for each in (x, y))
    return (first + second).round_()


def summand_factor(scale: float, output_scale: float) -> float:
    """Return the step of a summand in steps of the sum, in float32."""
    return in_float32(in_float32(scale) / in_float32(output_scale))


def in_float32(value: float) -> float:
    """Round a number to float32."""
    return float(np.float32(value))


def from_integers(integers: Tensor, scale: float) -> Tensor:
    """Return the floats of integers without zero point, equal in simulation and int8."""
    return integers * integers.new_tensor(scale)


def pooled(integers: Tensor, scale: float, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """Average integers without zero point over windows; equal in every memory layout.

    Args:
        integers: Floats [B, C, H, W] that hold integers, whose sums are exact.
        scale: The step of the grid.
        pool: The average pooling.
    """
    return from_integers(pool(integers.contiguous()), scale)
