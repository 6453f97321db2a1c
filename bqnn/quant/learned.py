"""LearnedFakeQuant: a fake quantizer whose scale is trained with the weights."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bqnn.layers.markers import RangeParameter
from bqnn.quant.fake_quant import FakeQuant
from bqnn.quant.observers import Observer


class LearnedFakeQuant(FakeQuant):
    """A fake quantizer with a learned step size (LSQ, Esser et al., arXiv 1902.08153).

    The observer sets scale and zero point from the first batch. From then on, the zero point
    stays, and the scale is exp(log_scale), a parameter with the gradient of `round_to_learned`.
    Outside of training, and while frozen, `scale` is that of the last training batch.

    Args:
        observer: Sets the first scale and the zero point.
        quant_min: The smallest integer.
        quant_max: The largest integer.
        channels: The number of channels C in dimension 0, each with its own grid, or None.
        per_row: Whether dimension 0 counts the rows of a batch, as that of activations does. The
            gradient is scaled by the number of values of a row.

    Examples:
        >>> from bqnn.quant.observers import make_observer
        >>> observer = make_observer("minmax", 0, 3)
        >>> quant = LearnedFakeQuant(observer, 0, 3, None, per_row=True).train()
        >>> quant(torch.tensor([[0.0, 1.0, 3.0]])).sum().backward()
        >>> quant.scale, quant.log_scale.grad is None
        (tensor([1.]), False)
    """

    def __init__(
        self,
        observer: Observer,
        quant_min: int,
        quant_max: int,
        channels: int | None,
        *,
        per_row: bool,
    ) -> None:
        super().__init__(observer, quant_min, quant_max, channels)
        self.per_row = per_row
        self.log_scale = RangeParameter(torch.zeros(channels or 1))

    @torch.no_grad()
    def watch(self, x: Tensor) -> None:
        if not self.training or self.frozen or self.has_range or x.numel() == 0:
            return
        super().watch(x)
        self.settle()
        self.log_scale.copy_(self.scale.log())

    def round(self, x: Tensor) -> Tensor:
        if not (self.enabled and self.training and torch.is_grad_enabled()) or self.frozen:
            return super().round(x)
        scale = self.log_scale.exp()
        self.scale.copy_(scale.detach())
        count = x[0].numel() if self.per_row else x.numel() // len(scale)
        zero_point = self.along(x, self.zero_point)
        ends = self.quant_min, self.quant_max
        return round_to_learned(x, self.along(x, scale), zero_point, ends, count)


def round_to_learned(
    x: Tensor, scale: Tensor, zero_point: Tensor, ends: tuple[int, int], count: int
) -> Tensor:
    """Round to a grid, with gradients for its scale.

    With v = x / scale, the levels -Q_n to Q_p, and the gradient of the output 1, that of the scale
    is

        -Q_n if v < -Q_n,    Q_p if v > Q_p,    round(v) - v otherwise,

    summed over the values of a grid and multiplied by 1 / sqrt(count * Q_p). That of x is 1 inside
    the range and 0 outside.

    Args:
        x: Values of any shape.
        scale: Steps, which broadcast along `x`.
        zero_point: The integers of 0, shaped like `scale`.
        ends: The smallest and the largest integer: Q_n = zero_point - ends[0] and
            Q_p = ends[1] - zero_point.
        count: The number of values that a scale serves.

    Examples:
        >>> x, scale = torch.tensor([0.3, 0.8, 5.0]), torch.tensor([1.0], requires_grad=True)
        >>> round_to_learned(x, scale, torch.zeros(1), (0, 3), count=3).sum().backward()
        >>> torch.allclose(scale.grad, (-0.3 + 0.2 + 3) / torch.tensor([9.0]).sqrt())
        True
    """
    out: Tensor = _RoundToLearned.apply(x, scale, zero_point, ends, count)
    return out


class _RoundToLearned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, ends: tuple[int, int], count: int
    ) -> Tensor:
        least, most = ends[0] - zero_point, ends[1] - zero_point
        steps = x * (1 / scale)  # as FakeQuant rounds
        rounded = torch.minimum(torch.maximum(steps.round(), least), most)
        ctx.save_for_backward(steps, rounded, scale, most)
        ctx.count = count
        return rounded * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        steps, rounded, scale, most = ctx.saved_tensors
        is_inside = steps.round() == rounded
        of_scale = torch.where(is_inside, rounded - steps, rounded) * grad
        dims = [dim for dim in range(grad.dim()) if dim >= scale.dim() or scale.shape[dim] == 1]
        of_scale = of_scale.sum(dims, keepdim=True).reshape(scale.shape)
        of_scale = of_scale / (ctx.count * most.clamp(min=1)).sqrt()
        return grad * is_inside, of_scale, None, None, None
