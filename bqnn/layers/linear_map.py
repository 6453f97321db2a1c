"""The function of linear layers and convolutions, for given weights."""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bqnn.layers.safe_convolutions import Gradients, pixels_read, safe_convolution_backward


class Geometry(NamedTuple):
    """The parameters of a convolution other than its weights, in torch's order."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Self:
        """Return the geometry of a layer. TypeError: its padding is asymmetric or not of zeros."""
        if layer.padding_mode != "zeros":
            raise TypeError(f"padding_mode={layer.padding_mode!r}: only 'zeros' can be converted")
        padding = layer.padding
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            if padding == "same" and any(pixels % 2 for pixels in reach):
                raise TypeError(
                    f"padding='same' at kernel_size={layer.kernel_size} pads one side more than "
                    "the other, which cannot be converted; choose an odd kernel_size"
                )
            padding = tuple(pixels // 2 if padding == "same" else 0 for pixels in reach)
        return cls(layer.stride, padding, layer.dilation, layer.groups)


def linear_map(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """Apply a convolution with this geometry, or a linear layer if it is None."""
    if geometry is None:
        return F.linear(x, weight, bias)
    x, stride = pixels_read(x, weight, *geometry)
    return F.conv2d(x, weight, bias, stride, *geometry[1:])


def linear_map_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry | None,
    *,
    needs_x: bool,
    needs_bias: bool,
) -> Gradients:
    """Return the gradients of `linear_map` by `x`, the weight and the bias."""
    if geometry is None:
        return (
            grad @ weight if needs_x else None,
            grad.t() @ x,
            grad.sum(0) if needs_bias else None,
        )
    return safe_convolution_backward(
        torch.ops.aten.convolution_backward,
        grad,
        x,
        weight,
        [len(weight)] if needs_bias else None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,  # transposed
        [0, 0],  # output_padding, of a transposed one
        geometry.groups,
        [needs_x, True, needs_bias],
    )
