"""Keep oneDNN from writing past a buffer in the backward pass of narrow 1x1 convolutions."""

import functools
import threading
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, library

SAFE_CHANNELS = 16  # convolutions with this many channels are safe on every CPU

Index = tuple[EllipsisType | slice, ...]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of inputs, weight and bias


def corrupts_memory(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Return whether oneDNN may write past a buffer in the weight gradient of a convolution.

    For 1x1 kernels with a stride above 1 and channels_last inputs, oneDNN copies the pixels that
    the stride selects. When it processes this copy in several parts, it assumes as many channels
    per pixel as a register holds numbers (8 with AVX2, 16 with AVX-512). With fewer channels it
    leaves the buffer. Measurements with guards around every buffer, in torch 2.9.1 and 2.14.1,
    with strides from 1 to 4 (also 2x1 and 1x2), found such writes with

    - AVX2, float32: for 1 to 7 input channels, with outputs of 4x11 and larger;
    - AVX-512, float32 and bfloat16: for 1 to 15 input channels, with outputs of 56x56 but not of
      32x32; never for 16 or more channels;
    - AMX, bfloat16: never.

    They also found them for conv1d, and for transposed convolutions with inputs and outputs
    exchanged: there the output channels (also dimension 1 of the weight) count. They found none in
    the forward pass, in the gradient of the inputs, and with padding, groups, conv3d, larger
    kernels, or strides that do not divide the input size. Such a write crashes the process at once
    or later, makes it hang, or, with several threads, corrupts gradients.

    The answer does not depend on the CPU, so that a network computes the same on every CPU.

    Args:
        weight: Weights [C', C, kH, kW], or [C', C, k] of a conv1d.
        stride: Stride of each dimension.
        padding: Padding of each dimension.
        groups: Number of groups.

    Examples:
        >>> corrupts_memory(torch.zeros(8, 4, 1, 1), stride=(2, 2), padding=(0, 0), groups=1)
        True
        >>> corrupts_memory(torch.zeros(8, 16, 1, 1), stride=(2, 2), padding=(0, 0), groups=1)
        False
    """
    kernel = weight.shape[2:]
    return (
        len(kernel) in (1, 2)
        and weight.device.type == "cpu"
        and not any(padding)
        and groups == 1
        and weight.shape[1] < SAFE_CHANNELS
        and max(kernel) == 1
        and max(stride) > 1
    )


def pixels_read(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Tensor, tuple[int, ...]]:
    """Return safe inputs and a safe stride that give a convolution the same outputs.

    If the convolution `corrupts_memory`, these are the pixels that the stride selects, and a
    stride of 1. Otherwise inputs and stride are returned unchanged.

    Args:
        x: Inputs [B, C, H, W].
        weight: Weights [C', C / groups, kH, kW].
        stride: Stride of each dimension.
        padding: Padding of each dimension.
        dilation: Dilation of each dimension.
        groups: Number of groups.

    Examples:
        >>> x, weight = torch.zeros(1, 4, 8, 8), torch.zeros(8, 4, 1, 1)
        >>> pixels, stride = pixels_read(x, weight, (2, 2), (0, 0), (1, 1), 1)
        >>> pixels.shape, stride
        (torch.Size([1, 4, 4, 4]), (1, 1))
    """
    if not corrupts_memory(weight, stride, padding, groups):
        return x, stride
    return x[_strided(stride)], (1,) * len(stride)


def guard_backward() -> None:
    """Guard the backward pass of all convolutions in this process, see `corrupts_memory`.

    This registers `safe_convolution_backward` as the CPU kernel of torch's operator
    `convolution_backward`, which computes all gradients of convolutions: of layers, functions,
    operators in torch.ops.aten, activation checkpointing, torch.func and compiled networks.
    Results change only by rounding. Each convolution takes 10 microseconds longer. The kernel
    stays registered until the process ends; further calls have no effect.
    """
    with _lock:
        _guard()


def safe_convolution_backward(
    original: Callable[..., Gradients],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Gradients:
    """Compute the gradients of torch's `convolution_backward` without corrupting memory.

    For a convolution that `corrupts_memory`, `original` receives the pixels that the stride
    selects, and a stride of 1.

    Args:
        original: torch's kernel. The other arguments are those of the operator.

    Returns:
        The gradients of inputs, weight and bias, None where `output_mask` is False.
    """
    rest = (padding, dilation, transposed)
    if not corrupts_memory(weight, stride, padding, groups):
        return original(
            grad, x, weight, bias_sizes, stride, *rest, output_padding, groups, output_mask
        )
    read, ones, zeros = _strided(stride), [1] * len(stride), [0] * len(stride)
    if transposed:  # the stride selects outputs here, and only the bias depends on all of them
        by_bias = grad.sum([0, *range(2, grad.dim())]) if output_mask[2] else None
        inner: Index = (..., *(slice(size) for size in x.shape[2:]))
        mask = [*output_mask[:2], False]
        by_x, by_weight, _ = original(
            grad[read][inner], x, weight, None, ones, *rest, zeros, groups, mask
        )
        return by_x, by_weight, by_bias
    by_read, by_weight, by_bias = original(
        grad, x[read], weight, bias_sizes, ones, *rest, zeros, groups, output_mask
    )
    by_x = None
    if by_read is not None:
        by_x = torch.zeros_like(x)
        by_x[read] = by_read
    return by_x, by_weight, by_bias


_lock = threading.Lock()


@functools.cache
def _guard() -> library.Library:
    """Register the kernel; the registration lasts as long as the returned object."""
    operator = torch.ops.aten.convolution_backward.default
    kernel = library.get_kernel(operator, "CPU")
    registration = library.Library("aten", "IMPL")

    def backward(keys: Any, *arguments: Any) -> Gradients:
        return safe_convolution_backward(functools.partial(kernel.call_boxed, keys), *arguments)

    registration.impl(
        "convolution_backward", backward, "CPU", with_keyset=True, allow_override=True
    )
    return registration


def _strided(stride: Sequence[int]) -> Index:
    """Return the index of the pixels that a stride selects."""
    return (..., *(slice(None, None, step) for step in stride))
