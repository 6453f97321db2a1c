"""Keep oneDNN from writing past a buffer in the backward pass of narrow 1x1 convolutions."""

from collections.abc import Callable
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SAFE_CHANNELS = 16  # from here on `corrupts_memory` holds on no CPU
KNOWN = ("torch.nn.", "bqnn.")  # modules whose kernels are their parameters


def corrupts_memory(
    weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...], groups: int
) -> bool:
    """Whether the gradient by the weight of a convolution may be written past a buffer.

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
    met: list[EllipsisType | slice] = [..., *(slice(None, None, step) for step in stride)]
    return x[tuple(met)], (1,) * len(stride)


class SafeConvolutions(TorchFunctionMode):
    """In a `with` statement no convolution of torch is computed in a way that `corrupts_memory`.

    It holds for layers of torch.nn and for functions of torch, and for the backward pass of what
    they compute. Each call costs about a microsecond: use it where `has_narrow_kernels`.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _SAFE.get(func, func)(*args, **(kwargs or {}))


def has_narrow_kernels(net: nn.Module) -> bool:
    """Whether a network may have 1x1 kernels on so few channels that one may be in that danger.

    A module from outside torch and bqnn may make its kernels of anything, such as a linear weight.
    """
    return any(
        weight.dim() in (3, 4) and weight.shape[1] < SAFE_CHANNELS and max(weight.shape[2:]) == 1
        for weight in net.parameters()
    ) or any(not type(module).__module__.startswith(KNOWN) for module in net.modules())


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.conv1d or torch.conv2d, safe."""

    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> Tensor:
        dimensions = weight.dim() - 2
        if padding == "valid":
            padding = 0
        if not isinstance(padding, str):
            steps, border = _each(stride, dimensions), _each(padding, dimensions)
            input, stride = pixels_read(input, weight, steps, border, (), groups)
        return function(input, weight, bias, stride, padding, dilation, groups)

    return convolution


def _transposed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.conv_transpose1d or torch.conv_transpose2d, safe by output channels of zeros."""

    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        dilation: int | tuple[int, ...] = 1,
    ) -> Tensor:
        dimensions, channels = weight.dim() - 2, weight.shape[1]
        missing = SAFE_CHANNELS - channels
        steps, border = _each(stride, dimensions), _each(padding, dimensions)
        is_unsafe = corrupts_memory(weight, steps, border, groups)
        if is_unsafe:
            weight = F.pad(weight, (0, 0) * dimensions + (0, missing))
            bias = None if bias is None else F.pad(bias, (0, missing))
        out = function(input, weight, bias, stride, padding, output_padding, groups, dilation)
        return out.narrow(1 - weight.dim(), 0, channels) if is_unsafe else out

    return convolution


def _each(value: int | tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    """One value for each dimension of a picture, as torch reads it."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


_SAFE: dict[Any, Callable[..., Tensor]] = {
    torch.conv1d: _convolution(torch.conv1d),
    torch.conv2d: _convolution(torch.conv2d),
    torch.conv_transpose1d: _transposed(torch.conv_transpose1d),
    torch.conv_transpose2d: _transposed(torch.conv_transpose2d),
}
