"""A loss whose gradients are known before the backward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_gradients(value: Tensor, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return a scalar whose backward pass gives each parameter its gradient.

    Args:
        value: The scalar.
        params: Leaf tensors that require gradients.
        gradients: The gradient of the scalar with respect to each parameter. They are not changed.

    Examples:
        >>> param = torch.zeros(2, requires_grad=True)
        >>> loss = with_gradients(torch.tensor(1.0), [param], [torch.tensor([3.0, 4.0])])
        >>> (2 * loss).backward()
        >>> param.grad
        tensor([6., 8.])
    """
    out: Tensor = _WithGradients.apply(value, gradients, *params)
    return out


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        return None, None, *torch._foreach_mul(ctx.gradients, factor)
