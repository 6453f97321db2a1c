"""FakeQuant: rounds floats to a quantization grid whose range an observer has seen."""

import torch
import torch.distributed as dist
from torch import Tensor

from bqnn.layers.markers import Quantized
from bqnn.quant.observers import ClippingObserver, LeastSquaresObserver, Observer, make_observer


class FakeQuant(Quantized):
    """Rounds floats to a quantization grid, and returns floats.

        x_q = scale * (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point)

    The gradient is straight-through: 1 inside the range, 0 outside. In training mode, an observer
    records the inputs and sets scale and zero point, unless `frozen` is set. If `enabled` is
    False, inputs pass unrounded.

    Args:
        observer: Sets scale and zero point; None for a fixed grid.
        quant_min: The smallest integer.
        quant_max: The largest integer.
        channels: The number of channels C in dimension 0, each with its own grid, or None for one
            grid. `scale` and `zero_point` are [C] or [1].

    Examples:
        >>> quant = make_fake_quant(2, signed=False)
        >>> quant(torch.tensor([0.0, 0.4, 2.0, 3.0]))
        tensor([0., 0., 2., 3.])
    """

    scale: Tensor
    zero_point: Tensor
    observer: Observer | None

    def __init__(
        self, observer: Observer | None, quant_min: int, quant_max: int, channels: int | None
    ) -> None:
        super().__init__()
        self.observer = observer
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.channels = channels
        self.register_buffer("scale", torch.zeros(channels or 1))
        self.register_buffer("zero_point", torch.zeros(channels or 1, dtype=torch.int32))
        self.enabled = True
        self.frozen = False
        self.is_due = True  # whether the next batch sets the range of a LeastSquaresObserver

    def forward(self, x: Tensor) -> Tensor:
        self.watch(x)
        return self.round(x)

    @torch.no_grad()
    def watch(self, x: Tensor) -> None:
        """Update the observer with `x`; only in training mode, and not while frozen."""
        if not self.training or self.frozen or self.observer is None:
            return
        x = x.detach()
        if isinstance(self.observer, LeastSquaresObserver):  # its search is slow
            self._watch_one_batch(x) if self.enabled else self.observer(x)
            return
        if not isinstance(self.observer, ClippingObserver):  # of weights, equal on all ranks
            x = _extremes_of_all_ranks(x, self.channels)
        self.observer(x)
        self.settle()

    def _watch_one_batch(self, x: Tensor) -> None:
        """Set the range from the first batch that is rounded, or the first one after `renew`.

        Without rounding, in a calibration, the range is that of all batches, and `settle` sets it.
        With several processes, the buffers of the first one replace those of the others.
        """
        assert isinstance(self.observer, LeastSquaresObserver)
        if self.is_due:
            self.observer.restart()
            self.observer(x)
            self.settle()
            self.is_due = False

    @torch.no_grad()
    def settle(self) -> None:
        """Set scale and zero point from the observer, if it has seen data."""
        if self.observer is None or not self.observer.has_data:
            return
        if self.observer.min_val.isnan().any():  # the loss becomes NaN, which is refused
            self.scale.fill_(torch.nan)
            return
        scale, zero_point = self.observer.grid()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest grid points, or `x` itself if rounding is disabled."""
        if not self.enabled:
            return x
        if torch.compiler.is_compiling():
            return self._traced_round(x)
        has_gradient = x.requires_grad and torch.is_grad_enabled()
        if not has_gradient and x.dtype == torch.float32 and x.device.type == "cpu":
            return self._round_on_cpu(x)
        if self.channels is None:
            return torch.fake_quantize_per_tensor_affine(
                x, self.scale, self.zero_point, self.quant_min, self.quant_max
            )
        return torch.fake_quantize_per_channel_affine(
            x, self.scale, self.zero_point, 0, self.quant_min, self.quant_max
        )

    def _round_on_cpu(self, x: Tensor) -> Tensor:
        """Round without gradient; torch's own operator takes several times as long on CPUs."""
        zero_point = self.along(x, self.zero_point)
        return self._float_integers(x).sub_(zero_point).mul_(self.along(x, self.scale))

    def _float_integers(self, x: Tensor) -> Tensor:
        integers = (x * (1 / self.along(x, self.scale))).round_()
        integers.add_(self.along(x, self.zero_point))
        return integers.clamp_(self.quant_min, self.quant_max)

    def _traced_round(self, x: Tensor) -> Tensor:
        """Round with elementary operators; torch's own cannot be traced with a free batch size."""
        scale, zero_point = self.along(x, self.scale), self.along(x, self.zero_point)
        values = x.detach()
        integers = (values * (1 / scale)).round() + zero_point
        rounded = (integers.clamp(self.quant_min, self.quant_max) - zero_point) * scale
        if not x.requires_grad:
            return rounded
        is_inside = (integers >= self.quant_min) & (integers <= self.quant_max)
        passing = torch.where(is_inside, x, values)
        return rounded + (passing - passing.detach())  # adds 0, with the gradient of `passing`

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """Quantize `x` to integers of the same shape, in int8 or uint8."""
        if self.enabled and x.dtype == torch.float32 and x.device.type == "cpu":
            return self._float_integers(x).to(torch.int8 if self.quant_min < 0 else torch.uint8)
        return self.integers_of_rounded(self.round(x))

    def integers_of_rounded(self, x: Tensor) -> Tensor:
        """Return the integers of floats that lie on the grid, in int8 or uint8."""
        integers = (x / self.along(x, self.scale)).round_()
        integers += self.along(x, self.zero_point)
        return integers.to(torch.int8 if self.quant_min < 0 else torch.uint8)

    def dequantize(self, integers: Tensor) -> Tensor:
        """Convert integers to floats, bit-equal to the results of `round`."""
        offset = integers.to(self.scale.dtype).sub_(self.along(integers, self.zero_point))
        return offset.mul_(self.along(integers, self.scale))

    @property
    def largest(self) -> int:
        """The largest distance of an integer of the grid from its zero point."""
        ends = (self.quant_min - self.zero_point, self.quant_max - self.zero_point)
        return max(int(end.abs().max()) for end in ends)

    @property
    def bits(self) -> int:
        """The bit width of the integers."""
        return (self.quant_max - self.quant_min).bit_length()

    @property
    def has_range(self) -> bool:
        """Whether the grid is set, by data or as a constant."""
        return bool((self.scale > 0).all())

    @staticmethod
    def along(x: Tensor, values: Tensor) -> Tensor:
        """Reshape values [C] to broadcast along dimension 0 of `x`."""
        return values.reshape(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"{self.quant_min} to {self.quant_max}, channels={self.channels}"


def _extremes_of_all_ranks(x: Tensor, channels: int | None) -> Tensor:
    """Return the minimum and maximum over all ranks, [2] or [C, 2]; `x` itself with one process.

    Observers need no more, and the ranges stay equal on all ranks.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    low, high = torch.aminmax(x.flatten() if channels is None else x.flatten(1), dim=-1)
    ends = torch.stack([-low, high])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return torch.stack([-ends[0], ends[1]], dim=-1)


def make_fake_quant(
    bits: int,
    *,
    signed: bool,
    symmetric: bool = False,
    channels: int | None = None,
    observer: str = "minmax",
) -> FakeQuant:
    """Create a fake quantizer.

    Args:
        bits: The bit width.
        signed: Whether integers are signed.
        symmetric: Whether the zero point is fixed in the center of the range.
        channels: The number of channels in dimension 0, each with its own grid, or None.
        observer: `minmax` (range of the newest tensor), `running_minmax` (range of all tensors),
            `moving_average` (moving average of minimum and maximum), `least_squares` (range of the
            newest tensor, cut to the smallest squared error) or `histogram` (range of all tensors
            with the smallest squared error; it needs `settle`).

    Examples:
        >>> make_fake_quant(4, signed=True, symmetric=True)
        FakeQuant(
          -8 to 7, channels=None
          (observer): Observer(min_val=inf, max_val=-inf)
        )
    """
    low = -(2 ** (bits - 1)) if signed else 0
    high = low + 2**bits - 1
    made = make_observer(observer, low, high, symmetric=symmetric, channels=channels)
    return FakeQuant(made, low, high, channels)


def make_fixed_fake_quant(bits: int, largest: float) -> FakeQuant:
    """Create a symmetric fake quantizer with the fixed range -largest to largest.

    Args:
        bits: The bit width.
        largest: The value of the largest integer.

    Examples:
        >>> make_fixed_fake_quant(8, largest=3.0)(torch.tensor([3.0, 10.0]))
        tensor([3., 3.])
    """
    high = 2 ** (bits - 1) - 1
    quant = FakeQuant(None, -high, high, None)
    quant.scale.fill_(largest / high)
    return quant
