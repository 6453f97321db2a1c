"""Keep oneDNN from writing past a buffer in the backward pass of narrow 1x1 convolutions."""

import functools
import threading
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

SAFE_CHANNELS = 16  # from here on `corrupts_memory` holds on no CPU

Index = tuple[EllipsisType | slice, ...]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # by inputs, weight and bias


def corrupts_memory(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Return whether a convolution's weight gradient may be written past a buffer.

    For a kernel of 1x1 with a stride over 1, on inputs in channels_last, oneDNN copies the pixels
    that the stride meets. Where it walks through this copy in several parts, it takes each pixel
    to have as many channels as a register has numbers, 8 with AVX2 and 16 with AVX-512, and so
    leaves the copy where there are fewer. Measured with guards around every buffer, in torch
    2.9.1 and 2.14.1, at strides of 1 to 4 (2x1 and 1x2, too):

    - AVX2, float32: 1 to 7 input channels, seen from outputs of 4x11 on;
    - AVX-512, float32 and bfloat16: 1 to 15 input channels, seen at outputs of 56x56 and not
      at 32x32; 16 and more, never;
    - AMX, bfloat16: never.

    conv1d does so, too, and transposed convolutions, which have the roles of inputs and outputs
    reversed: there the output channels, dimension 1 of the weight as well, are what counts.
    Never seen: in the forward pass, in the gradient by the inputs, with padding, with groups, in
    conv3d, with larger kernels, and where the stride does not divide the size of the inputs.
    Such a write ends the process, then or later, keeps it busy for ever, or, with several
    threads, spoils gradients.

    The answer is the same for all CPUs, so that a network computes alike on each.
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
    """What a convolution is to be given in place of `x` and its stride, for the same outputs.

    Where its gradient `corrupts_memory` these are the pixels that the stride meets, and a stride
    of 1; anywhere else they stay what they are.
    """
    if not corrupts_memory(weight, stride, padding, groups):
        return x, stride
    return x[_met(stride)], (1,) * len(stride)


def guard_backward() -> None:
    """Guard the backward pass of all convolutions in this process, see `corrupts_memory`.

    It gives torch's operator `convolution_backward` a kernel for the CPU, which is
    `safe_convolution_backward`. All gradients of convolutions come from there: those of layers, of
    functions, of operators in torch.ops.aten, of a checkpoint that computes its part again, of
    torch.func and of compiled networks. Results change by rounding alone. A convolution costs 10
    microseconds more. The kernel stays for the life of the process; more calls change nothing.
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

    There, `original` gets the pixels that the stride meets, and a stride of 1.

    Args:
        original: torch's own, which takes the other arguments. They are those of the operator.
    """
    rest = (padding, dilation, transposed)
    if not corrupts_memory(weight, stride, padding, groups):
        return original(
            grad, x, weight, bias_sizes, stride, *rest, output_padding, groups, output_mask
        )
    met, ones, zeros = _met(stride), [1] * len(stride), [0] * len(stride)
    if transposed:  # here the stride is one through the outputs, and only the bias meets all
        by_bias = grad.sum([0, *range(2, grad.dim())]) if output_mask[2] else None
        inner: Index = (..., *(slice(size) for size in x.shape[2:]))
        mask = [*output_mask[:2], False]
        by_x, by_weight, _ = original(
            grad[met][inner], x, weight, None, ones, *rest, zeros, groups, mask
        )
        return by_x, by_weight, by_bias
    by_met, by_weight, by_bias = original(
        grad, x[met], weight, bias_sizes, ones, *rest, zeros, groups, output_mask
    )
    by_x = None
    if by_met is not None:
        by_x = torch.zeros_like(x)
        by_x[met] = by_met
    return by_x, by_weight, by_bias


_lock = threading.Lock()


@functools.cache
def _guard() -> torch.library.Library:
    """The registration, which ends with this object."""
    operator = torch.ops.aten.convolution_backward.default
    kernel = torch.library.get_kernel(operator, "CPU")
    library = torch.library.Library("aten", "IMPL")

    def backward(keys: Any, *arguments: Any) -> Gradients:
        return safe_convolution_backward(functools.partial(kernel.call_boxed, keys), *arguments)

    library.impl("convolution_backward", backward, "CPU", with_keyset=True, allow_override=True)
    return library


def _met(stride: Sequence[int]) -> Index:
    """The index of the pixels that a stride meets."""
    return (..., *(slice(None, None, step) for step in stride))
