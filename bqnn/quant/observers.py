"""Observers: choose the scale and zero point of a quantization grid from the data it rounds."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

SMALLEST_SCALE = 2.0**-60  # 2**-23, usual elsewhere, would round small standard deviations to 0
# For each kind of recorded range, the weight of the newest tensor.
MOMENTA = {"minmax": 1.0, "running_minmax": None, "moving_average": 0.01}


def make_observer(
    kind: str,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool = False,
    channels: int | None = None,
) -> "Observer":
    """Create an observer.

    Args:
        kind: `minmax` (range of the newest tensor), `running_minmax` (range of all tensors),
            `moving_average` (moving average of minimum and maximum), or, with the smallest squared
            error, `least_squares` (range of the newest tensor) or `histogram` (of all tensors).
        quant_min: The smallest integer.
        quant_max: The largest integer.
        symmetric: Whether the zero point is fixed in the center of the range.
        channels: The number of channels in dimension 0, each with its own range, or None;
            `histogram` has one range.

    Raises:
        ValueError: The kind is unknown, or a histogram would need channels.

    Examples:
        >>> make_observer("running_minmax", 0, 255)
        Observer(min_val=inf, max_val=-inf)
    """
    if kind == "histogram" and channels is None:
        return LeastSquaresObserver(quant_min, quant_max, symmetric=symmetric)
    if kind == "least_squares":
        return ClippingObserver(quant_min, quant_max, symmetric=symmetric, channels=channels)
    if kind not in MOMENTA:
        choices = ", ".join(MOMENTA) + ", least_squares" + ("" if channels else ", histogram")
        raise ValueError(f"observer={kind!r}: choose one of {choices}")
    return Observer(
        quant_min, quant_max, symmetric=symmetric, channels=channels, momentum=MOMENTA[kind]
    )


class Observer(nn.Module):
    """Records the smallest and the largest value of tensors; their range becomes the grid.

        scale = (max_val - min_val) / (quant_max - quant_min)
        zero_point = quant_min - round(min_val / scale)

    The range is first extended to contain 0, which is always a point of the grid. A symmetric grid
    reaches from -m to m, where m is the largest magnitude.

    Args:
        quant_min: The smallest integer.
        quant_max: The largest integer.
        symmetric: Whether the zero point is fixed in the center of the range.
        channels: The number of channels C in dimension 0, each with its own range, or None for one
            range.
        momentum: The weight of the newest tensor in moving averages of the smallest and the
            largest value: 1 for the range of the newest tensor. None for the range of all tensors.

    Examples:
        >>> observer = Observer(0, 255)
        >>> observer(torch.tensor([-0.5, 2.05]))
        >>> observer.grid()
        (tensor([0.0100]), tensor([50], dtype=torch.int32))
    """

    min_val: Tensor  # [] or [C], inf before the first data
    max_val: Tensor  # [] or [C], -inf before the first data

    def __init__(
        self,
        quant_min: int,
        quant_max: int,
        *,
        symmetric: bool = False,
        channels: int | None = None,
        momentum: float | None = None,
    ) -> None:
        super().__init__()
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.symmetric = symmetric
        self.channels = channels
        self.momentum = momentum
        shape = () if channels is None else (channels,)
        self.register_buffer("min_val", torch.full(shape, torch.inf))
        self.register_buffer("max_val", torch.full(shape, -torch.inf))
        self.register_load_state_dict_pre_hook(_take_old_state)

    @torch.no_grad()
    def forward(self, x: Tensor) -> None:
        """Record the range of `x`, of any shape, or [C, ...] with channels."""
        if x.numel() == 0:
            return
        x = x.detach().to(self.min_val.dtype)
        low, high = (
            torch.aminmax(x) if self.channels is None else torch.aminmax(x.flatten(1), dim=1)
        )
        if self.momentum is None:
            low, high = torch.minimum(low, self.min_val), torch.maximum(high, self.max_val)
        else:
            is_first = self.min_val > self.max_val
            low = torch.where(is_first, low, self.min_val + self.momentum * (low - self.min_val))
            high = torch.where(is_first, high, self.max_val + self.momentum * (high - self.max_val))
        self.min_val.copy_(low)
        self.max_val.copy_(high)

    @property
    def has_data(self) -> bool:
        """Whether there is a range to compute a grid from."""
        return not bool(self.min_val.isinf().any())

    @property
    def center(self) -> int:
        """The zero point of a symmetric grid: 0 if integers are signed."""
        return max(0, (self.quant_min + self.quant_max) // 2)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Compute the scale and the zero point, [1] or [C], from the recorded range."""
        low, high = self.min_val.clamp(max=0).reshape(-1), self.max_val.clamp(min=0).reshape(-1)
        steps = float(self.quant_max - self.quant_min)
        if self.symmetric:
            scale = (torch.maximum(-low, high) / (steps / 2)).clamp(min=SMALLEST_SCALE)
            return scale, torch.full_like(scale, self.center, dtype=torch.int32)
        scale = ((high - low) / steps).clamp(min=SMALLEST_SCALE)
        zero_point = self.quant_min - torch.round(low / scale).to(torch.int32)
        return scale, zero_point.clamp(self.quant_min, self.quant_max)

    def extra_repr(self) -> str:
        return f"min_val={self.min_val}, max_val={self.max_val}"


class ClippingObserver(Observer):
    """Records the range of the newest tensor, cut to the share with the smallest squared error.

    Both ends are multiplied by the same share, which is searched from 1/16 to 1 for each channel.
    At few bits, most values are near 0, and the largest ones would make the steps too coarse for
    them.

    Args:
        quant_min: The smallest integer.
        quant_max: The largest integer.
        symmetric: Whether the zero point is fixed in the center of the range.
        channels: The number of channels C in dimension 0, each with its own range, or None for one
            range.

    Examples:
        >>> observer = ClippingObserver(-2, 1, symmetric=True)  # 2 bits
        >>> observer(torch.cat([torch.linspace(-1, 1, 101), torch.tensor([4.0])]))
        >>> observer.max_val < 4.0
        tensor(True)
    """

    @torch.no_grad()
    def forward(self, x: Tensor) -> None:
        super().forward(x)
        if x.numel() == 0 or not self.has_data or self.min_val.isnan().any():
            return
        rows = x.detach().float().flatten(1) if self.channels else x.detach().float().reshape(1, -1)
        ends = self.min_val.clone(), self.max_val.clone()
        share = torch.ones(len(rows), device=x.device)
        best = torch.full_like(share, torch.inf)
        for spacing, count in ((1 / 16, 15), (1 / 64, 3), (1 / 256, 3)):
            center = share.clone()
            for offset in range(-count, count + 1):
                candidate = (center + spacing * offset).clamp(1 / 16, 1)
                self._cut(ends, candidate)
                errors = self._squared_errors(rows)
                is_better = errors < best
                best = torch.where(is_better, errors, best)
                share = torch.where(is_better, candidate, share)
        self._cut(ends, share)

    def _cut(self, ends: tuple[Tensor, Tensor], share: Tensor) -> None:
        share = share if self.channels else share.squeeze(0)
        self.min_val.copy_(ends[0] * share)
        self.max_val.copy_(ends[1] * share)

    def _squared_errors(self, rows: Tensor) -> Tensor:
        """Return the sum of squared errors of rows [C, N], [C]."""
        scale, zero_point = (values.unsqueeze(1) for values in self.grid())
        steps = (rows / scale).round_().add_(zero_point).clamp_(self.quant_min, self.quant_max)
        return steps.sub_(zero_point).mul_(scale).sub_(rows).square_().sum(1)


def _take_old_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Accept the state of torch's observers, which earlier checkpoints hold.

    Their constant `eps` and their histogram are not needed. Per channel, `min_val` and `max_val`
    are empty before the first data.
    """
    for name in ("eps", "histogram"):
        state.pop(prefix + name, None)
    for name, value in (("min_val", torch.inf), ("max_val", -torch.inf)):
        own, found = getattr(module, name), state.get(prefix + name)
        if found is not None and found.shape == (0,):
            state[prefix + name] = torch.full_like(own, value)


# Values of one sign share a bin if their exponents and the first MANTISSA_BITS of their mantissas
# are equal.
MANTISSA_BITS = 9
DROPPED_BITS = 23 - MANTISSA_BITS
OCTAVES = 24  # values that are smaller than the largest by more share the bin of 0
SIZE = OCTAVES << MANTISSA_BITS  # the number of bins of one sign


class LeastSquaresObserver(Observer):
    """Records a histogram; the grid minimizes the squared error of rounding and clipping.

    The bins are spaced logarithmically, so that the histogram extends to any range without changes
    to its bins. They keep the count and the sum of their values. The grid depends on neither the
    order nor the size of the tensors. Infinite values are ignored, with a warning; NaN values raise
    a ValueError.

    Args:
        quant_min: The smallest integer.
        quant_max: The largest integer.
        symmetric: Whether the zero point is fixed in the center of the range.

    Examples:
        >>> observer = LeastSquaresObserver(0, 3)  # 2 bits
        >>> for batch in torch.linspace(0, 0.99, 100), torch.tensor([2.0]):  # an outlier
        ...     observer(batch)
        >>> scale, zero_point = observer.grid()
        >>> 3 * scale.item() < 1.1, zero_point.item()  # clips it
        (True, 0)
    """

    def __init__(self, quant_min: int, quant_max: int, *, symmetric: bool = False) -> None:
        super().__init__(quant_min, quant_max, symmetric=symmetric)
        # Counts and sums [2, 2 * SIZE + 1] of values in ascending order. Not a buffer: its float64
        # would not move to every device.
        self._histogram: Tensor | None = None
        self._first_bin = 0  # magnitudes in this bin and below share the bin of 0

    @torch.no_grad()
    def forward(self, x: Tensor) -> None:
        """Record all values of `x`, of any shape."""
        x = x.detach().float().flatten()
        x = x.cpu() if x.is_mps else x  # it has no float64
        if x.numel() > 0 and not all(end.isfinite() for end in x.aminmax()):
            if x.isnan().any():
                raise ValueError(
                    "an activation is NaN, so it has no range; check the network's outputs in float"
                )
            warnings.warn("ignoring infinite values in the range of a tensor", stacklevel=2)
            x = x[~x.isinf()]
        if x.numel() > 0:
            super().forward(x)
            self._count(x)

    def restart(self) -> None:
        """Forget all values."""
        self.min_val.fill_(torch.inf)
        self.max_val.fill_(-torch.inf)
        self._histogram, self._first_bin = None, 0

    def _count(self, x: Tensor) -> None:
        """Add finite values [N] to the histogram."""
        largest = torch.maximum(-self.min_val, self.max_val).float()
        first_bin = max(int(_bin(largest)) - SIZE, 0)
        if self._histogram is None:
            histogram = torch.zeros(2, 2 * SIZE + 1, dtype=torch.float64, device=x.device)
        else:
            histogram = _merged(self._histogram.to(x.device), first_bin - self._first_bin)
        sign = x.view(torch.int32) >> 31  # -1 or 0
        distance = (_bin(x) - first_bin).clamp_(min=0)
        place = (distance ^ sign).sub_(sign).add_(SIZE)  # SIZE - distance or SIZE + distance
        histogram[0] += torch.bincount(place, minlength=2 * SIZE + 1)
        histogram[1].index_add_(0, place, x.double())  # deterministic on a GPU, unlike bincount
        self._histogram, self._first_bin = histogram, first_bin

    @property
    def has_data(self) -> bool:
        """Whether there is a histogram to compute a grid from, which checkpoints do not have."""
        return self._histogram is not None

    @torch.no_grad()
    def grid(self) -> tuple[Tensor, Tensor]:
        """Search for the scale and the zero point, both [1], with the smallest squared error."""
        scale, zero_point = super().grid()
        if self._histogram is None or self.min_val >= self.max_val:
            return scale, zero_point  # a single value is one end of the range, without error
        steps = self.quant_max - self.quant_min
        # Limits of the lowest level, counted from 0. Data of one sign leave no choice.
        first, last = -steps if self.min_val < 0 else 0, 0 if self.max_val > 0 else -steps
        if self.symmetric:
            first = last = self.quant_min - self.center
        histogram = self._histogram.cpu()
        histogram = histogram[:, histogram[0] > 0]
        scales = _spaced(scale.cpu().double(), -16, 1, 69)
        for octaves in (1 / 4, 1 / 32):  # the spacing of the scales
            errors, _ = _errors(histogram, scales, steps, first, last)
            scales = _spaced(scales[errors.topk(3, largest=False).indices], -octaves, octaves, 17)
        errors, lowest = _errors(histogram, scales, steps, first, last)
        best = errors.argmin().reshape(1)
        return scales[best].to(scale.dtype), self.quant_min - lowest[best]


def _bin(x: Tensor) -> Tensor:
    """Return the bin of each magnitude of `x`, in float32; that of 0 is 0."""
    return (x.view(torch.int32) & 0x7FFF_FFFF) >> DROPPED_BITS


def _merged(histogram: Tensor, count: int) -> Tensor:
    """Merge the `count` bins on either side of 0 with that of 0, and move the others inwards."""
    if count == 0:
        return histogram
    kept = max(SIZE - count, 0)
    low, middle, high = histogram.split([kept, 2 * (SIZE - kept) + 1, kept], dim=1)
    free = histogram.new_zeros(2, SIZE - kept)
    return torch.cat([free, low, middle.sum(1, keepdim=True), high, free], dim=1)


def _spaced(scales: Tensor, low: float, high: float, count: int) -> Tensor:
    """Return `count` scales about each of `scales`, from 2^low to 2^high times as large."""
    octaves = torch.linspace(low, high, count, dtype=torch.float64, device=scales.device)
    return (scales[:, None] * octaves.exp2()).flatten().clamp(min=SMALLEST_SCALE)


def _errors(
    histogram: Tensor, scales: Tensor, steps: int, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Compute the squared errors of grids with the levels scale * (lowest, ..., lowest + steps).

    A bin with the count n and the sum s contributes q (q n - 2 s) at the level q, except for a
    constant. Sums over the bins of a level and over the levels of a grid are differences of
    cumulative sums, so all grids of one scale together cost as much as one.

    Args:
        histogram: Counts and sums of the bins [2, B], in ascending order.
        scales: The scales [K] to compare.
        steps: The number of levels - 1.
        first: The smallest of the lowest levels to compare.
        last: The largest of the lowest levels to compare.

    Returns:
        The smallest error of each scale, except for a constant, and its lowest level, [K].
    """
    numbers = torch.arange(first, last + steps + 1, device=scales.device)
    levels = scales[:, None] * numbers  # [K, L]
    edges = scales[:, None] * (numbers[:-1] + 0.5)
    cumulative = pad(histogram.cumsum(1), (1, 0))
    below = cumulative[:, torch.searchsorted(histogram[1] / histogram[0], edges)]  # [2, K, L - 1]
    above = cumulative[:, -1:, None] - below

    def error(level: Tensor, bins: Tensor) -> Tensor:
        return level * (level * bins[0] - 2 * bins[1])

    lowest = error(levels[:, :-1], below)  # of all values below an edge, at the level before it
    highest = error(levels[:, 1:], above)
    inner = pad(error(levels[:, 1:-1], below.diff()).cumsum(1), (1, 0))
    count = last - first + 1
    errors = lowest[:, :count] + inner[:, steps - 1 :] - inner[:, :count] + highest[:, steps - 1 :]
    best = errors.min(1)
    return best.values, (best.indices + first).to(torch.int32)
