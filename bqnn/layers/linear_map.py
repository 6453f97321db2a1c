"""The functional form of linear layers and convolutions."""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bqnn.layers.safe_convolutions import Gradients, pixels_read, safe_convolution_backward


class Geometry(NamedTuple):
    """The hyperparameters of a convolution, in the order of F.conv2d.

    Examples:
        >>> Geometry.of(nn.Conv2d(1, 4, 3, padding="same"))
        Geometry(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Self:
        """Return the geometry of a layer.

        Raises:
            TypeError: The padding is asymmetric, or is not zero padding.
        """
        if layer.padding_mode != "zeros":
            raise TypeError(
                f"padding_mode={layer.padding_mode!r}: cannot be converted; choose 'zeros'"
            )
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
    """Apply a linear layer or a convolution.

    Args:
        x: Inputs [..., in_features], or [B, C, H, W] for a convolution.
        weight: Weights [out_features, in_features], or [C', C / groups, kH, kW].
        bias: Bias [out_features] or [C'], or None.
        geometry: Geometry of the convolution; None for a linear layer.

    Examples:
        >>> linear_map(torch.ones(1, 3), torch.ones(2, 3), None, None)
        tensor([[3., 3.]])
    """
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
    """Compute the gradients of `linear_map` with respect to inputs, weight and bias.

    Args:
        grad: Gradient with respect to the output.
        x: Inputs of `linear_map`.
        weight: Weights of `linear_map`.
        geometry: Geometry of the convolution; None for a linear layer.
        needs_x: Whether to compute the gradient with respect to the inputs.
        needs_bias: Whether to compute the gradient with respect to the bias.

    Returns:
        The three gradients; None for one that was not asked for.
    """
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
        [0, 0],  # output_padding, for transposed convolutions only
        geometry.groups,
        [needs_x, True, needs_bias],
    )
