"""The backend: fake quantizers, and torch's int8 operators.

Only this module of the package uses torch.ops.quantized. Upstream has deprecated its quantized
tensors. To remove the dependency, replace the calls in `PackedWeight` and `add`. The rounding in
`FakeQuant` and the observers use core operators.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bqnn.arguments import ArgumentError
from bqnn.layers.linear_map import Geometry
from bqnn.layers.markers import Quantized
from bqnn.quant.grids import Grid
from bqnn.quant.observers import LeastSquaresObserver, Observer, make_observer

# torch 2.13 and newer warn of each quantized type. Only the warnings of this package are silenced.
warnings.filterwarnings(
    "ignore",
    message=r"torch.quantize_per_tensor, torch.quantize_per_channel and other quantized tensor "
    r"creation functions that produce tensors with dtype torch.quint8, torch.qint8, and "
    r"torch.qint32 are deprecated",
    category=UserWarning,
    module=r"bqnn\.quant\.",
)

_packing = Lock()  # the engine is a process-wide setting of torch


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

    def forward(self, x: Tensor) -> Tensor:
        self.watch(x)
        return self.round(x)

    @torch.no_grad()
    def watch(self, x: Tensor) -> None:
        """Update the observer with `x`; only in training mode, and not while frozen."""
        if not self.training or self.frozen or self.observer is None:
            return
        self.observer(_extremes_of_all_ranks(x.detach(), self.channels))
        if not isinstance(self.observer, LeastSquaresObserver):  # its search is slow: call settle()
            self.settle()

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
        if self.channels is None:
            return torch.fake_quantize_per_tensor_affine(
                x, self.scale, self.zero_point, self.quant_min, self.quant_max
            )
        return torch.fake_quantize_per_channel_affine(
            x, self.scale, self.zero_point, 0, self.quant_min, self.quant_max
        )

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """Quantize `x` to integers of the same shape, in int8 or uint8."""
        integers = (self.round(x) / self.along(x, self.scale)).round_()
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
            `moving_average` (moving average of minimum and maximum) or `histogram` (range with the
            smallest squared error; it needs `settle`).

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


def has_vnni() -> bool:
    """Return whether this CPU has VNNI, which sums products of 8-bit integers in 32 bits."""
    return torch.cpu._is_vnni_supported()


def can_saturate(weight_bits: int, activation_bits: int) -> bool:
    """Return whether the sum of two products can exceed 16 bits, which some kernels use.

    Args:
        weight_bits: Bit width of the weights.
        activation_bits: Bit width of the activations.

    Examples:
        >>> can_saturate(8, 7), can_saturate(8, 8)
        (False, True)
    """
    return 2 * (2**activation_bits - 1) * 2 ** (weight_bits - 1) > 32_767


def check_engine(engine: str) -> None:
    """Raise a ValueError if this build of torch lacks the engine."""
    supported = torch.backends.quantized.supported_engines
    if engine not in supported:
        raise ArgumentError(
            f"engine={engine}: this build of torch lacks it; choose one of {', '.join(supported)}",
            "engine",
        )


# The rounding of a kernel: `requantize` defines it, bqnn/quant/kernels.py measures it.
Rounding = Literal["fbgemm", "fbgemm_fused", "onednn", "onednn_product"]


def requantize(
    sums: Tensor,
    input_scale: float,
    weight: FakeQuant,
    bias: Tensor | None,
    output: FakeQuant,
    relu: bool,
    rounding: Rounding,
) -> Tensor:
    """Round exact sums of integer products to the grid of the outputs, as a kernel does.

        fbgemm          y = s_y clamp(round((sums + bias / (s_x s_w)) * (s_x s_w / s_y)))
        fbgemm_fused    the same, with a fused multiply-add of the bias and 1 / (s_x s_w)
        onednn          y = s_y (clamp(round((sums * s_x * s_w + bias) * (1 / s_y) + z_y)) - z_y)
        onednn_product  the same, with sums * (s_x * s_w)

    All operations are in float32 and in the order of the kernel, so that even ties round equally.

    Args:
        sums: Sums of products [B, C, ...], integers in float32.
        input_scale: Scale s_x of the inputs.
        weight: Grid of the weights, with the scale s_w.
        bias: Bias [C], or None.
        output: Grid of the outputs, with the scale s_y and the zero point z_y.
        relu: Whether the kernel applies a ReLU.
        rounding: The kernel's formula.

    Returns:
        Outputs y [B, C, ...], floats on the grid of `output`.
    """
    along = (1, -1) + (1,) * (sums.dim() - 2)
    zero_point = int(output.zero_point)
    if rounding in ("onednn", "onednn_product"):
        # oneDNN receives inverse scales, also those of a linear layer's weights.
        s_x = 1 / (1 / output.scale.new_tensor(input_scale))
        s_w = (weight.scale if sums.dim() == 4 else 1 / (1 / weight.scale)).view(along)
        steps = sums * s_x * s_w if rounding == "onednn" else sums * (s_x * s_w)
        if bias is not None:
            steps += bias.view(along)
        steps.mul_(1 / output.scale).add_(zero_point).round_().sub_(zero_point)
    else:
        product = weight.scale * input_scale
        if bias is not None:
            sums = _plus_bias(sums, bias.view(along), product.view(along), weight, rounding)
        steps = (sums * (product / output.scale).view(along)).round_()
    low = 0 if relu else output.quant_min - zero_point
    return steps.clamp_(low, output.quant_max - zero_point).mul_(output.scale)


def _plus_bias(
    sums: Tensor, bias: Tensor, product: Tensor, weight: FakeQuant, rounding: Rounding
) -> Tensor:
    """Compute sums + bias / product as FBGEMM does."""
    if weight.channels is not None:
        return sums + bias / product
    if rounding == "fbgemm":
        return sums + bias * (1 / product)
    # The product of two float32 numbers is exact in float64.
    return (sums.double() + bias.double() * (1 / product).double()).float()


def requantized_sum(
    x: Tensor, x_grid: Grid, y: Tensor, y_grid: Grid, output: FakeQuant, relu: bool
) -> Tensor:
    """Compute x + y, or relu(x + y), on the grid of `output`, bit-equal to `add`.

    The operator computes scale * integer - scale * zero_point with a fused multiply-add, which
    rounds once. The product is exact in float64.

    Args:
        x: Activations on the grid `x_grid`, floats of any shape.
        x_grid: The grid of `x`.
        y: Activations on the grid `y_grid`, shaped like `x`.
        y_grid: The grid of `y`.
        output: The grid of the outputs.
        relu: Whether a ReLU follows.
    """
    total = dequantized_for_sum(x, x_grid) + dequantized_for_sum(y, y_grid)
    zero_point = int(output.zero_point)
    steps = (total.relu_() if relu else total).mul_(1 / output.scale).round_()
    steps.clamp_(output.quant_min - zero_point, output.quant_max - zero_point)
    return steps.mul_(output.scale)


def dequantized_for_sum(x: Tensor, grid: Grid) -> Tensor:
    """Return activations on a grid as the operator of a residual sum reads them."""
    scale = x.new_tensor(grid.scale)  # float32, as in the operator
    integers = (x / scale).round_() + grid.zero_point
    offset = (scale * grid.zero_point).double()
    return integers.double().mul_(scale.double()).sub_(offset).float()


def in_batch(x: Tensor, is_conv: bool) -> Tensor:
    """Reshape inputs for a kernel: [..., F] -> [N, F]; images [B, C, H, W] are unchanged.

    Args:
        x: The inputs.
        is_conv: Whether the kernel is a convolution.

    Raises:
        ValueError: Images have no batch dimension.
    """
    if not is_conv:
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if x.dim() != 4:
        raise ValueError(
            f"inputs of shape {tuple(x.shape)}: a quantized convolution takes [B, C, H, W]; add "
            "the batch dimension with x[None]"
        )
    return x


class PackedWeight:
    """Integer weights and a float bias, packed for an engine.

    Args:
        weight: Quantized weights, see `quantized_weight`.
        bias: Bias [C], or None.
        geometry: Geometry of the convolution; None for a linear layer.
        engine: fbgemm, x86 or onednn.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: Geometry | None, engine: str
    ) -> None:
        ops = torch.ops.quantized
        self._geometry, self._engine = geometry, engine
        self._is_conv = geometry is not None
        with _using(engine):
            if geometry is None:
                self._packed = ops.linear_prepack(weight, bias)
            else:
                self._packed = ops.conv2d_prepack(weight, bias, *geometry)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the weights unpacked, because torch would pack them for its current engine."""
        ops = torch.ops.quantized
        unpack = ops.conv2d_unpack if self._is_conv else ops.linear_unpack
        return PackedWeight, (*unpack(self._packed), self._geometry, self._engine)

    def __call__(self, x: Tensor, relu: bool, scale: float, zero_point: int) -> Tensor:
        """Run the engine on quantized inputs; scale and zero point are those of the outputs."""
        ops = torch.ops.quantized
        if self._is_conv:
            run = ops.conv2d_relu if relu else ops.conv2d
        else:
            run = ops.linear_relu if relu else ops.linear
        out = run(in_batch(x, self._is_conv), self._packed, scale, zero_point)
        return out if x.dim() == out.dim() else out.reshape(*x.shape[:-1], out.shape[-1])


def quantized_weight(weight: Tensor, quant: FakeQuant) -> Tensor:
    """Convert weights on the grid of `quant` to a quantized tensor."""
    if quant.channels is None:
        scale, zero_point = float(quant.scale), int(quant.zero_point)
        return torch.quantize_per_tensor(weight, scale, zero_point, torch.qint8)
    scales, zero_points = quant.scale.double(), quant.zero_point.long()
    return torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8)


def quantized_activation(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Convert floats to a quantized tensor of 8 bits."""
    return torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)


class ActivationGrid:
    """The grid of an activation, as Python numbers, which are fast to read."""

    def __init__(self, quant: FakeQuant) -> None:
        self.scale = float(quant.scale)
        self.zero_point = int(quant.zero_point)
        self.quant_max = quant.quant_max
        self._largest = self.scale * (self.quant_max - self.zero_point)

    def quantize(self, x: Tensor) -> Tensor:
        """Convert floats to a quantized tensor."""
        return self.clamp(quantized_activation(x, self.scale, self.zero_point))

    def clamp(self, x: Tensor) -> Tensor:
        """Clamp a quantized tensor to the bits of the grid; operators use all 8 bits."""
        if self.quant_max == 255:
            return x
        return torch.clamp(x, max=self._largest)


def add(x: Tensor, y: Tensor, grid: ActivationGrid, relu: bool) -> Tensor:
    """Compute x + y, or relu(x + y), of quantized activations on a grid."""
    run = torch.ops.quantized.add_relu if relu else torch.ops.quantized.add
    return grid.clamp(run(x, y, grid.scale, grid.zero_point))


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


def centered(x: Tensor) -> Tensor:
    """Return integer - zero_point of a quantized tensor, as floats."""
    return x.int_repr().float() - x.q_zero_point()


def keep_scaled(x: Tensor, kept: Tensor, factor: float) -> Tensor:
    """Multiply a quantized tensor by `factor` where `kept` is True, and by zero elsewhere; exact.

    The factor multiplies the scale, and dropped values become the zero point.

    Args:
        x: A quantized tensor.
        kept: Booleans that broadcast over `x`.
        factor: The factor.
    """
    zero_point = x.q_zero_point()
    out = torch._empty_affine_quantized(
        x.shape,
        scale=x.q_scale() * factor,
        zero_point=zero_point,
        dtype=torch.quint8,
        memory_format=layout(x),
    )
    source, target = _integers(x), _integers(out)
    if zero_point == 0:
        torch.mul(source, kept, out=target)
    else:  # uint8 arithmetic wraps modulo 256, which cancels in the two shifts
        torch.sub(source, zero_point, out=target).mul_(kept).add_(zero_point)
    return out


def _integers(x: Tensor) -> Tensor:
    """View the memory of a quantized tensor as uint8; `int_repr` would copy it."""
    view = torch.empty(0, dtype=torch.uint8)
    return view.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def quantized_like(x: Tensor, like: Tensor) -> Tensor:
    """Quantize floats to the grid and memory layout of a quantized activation."""
    x = x.to(memory_format=layout(like))
    return quantized_activation(x, like.q_scale(), like.q_zero_point())


def layout(x: Tensor) -> torch.memory_format:
    """Return channels_last for images in that layout, and contiguous_format otherwise."""
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


@contextmanager
def _using(engine: str) -> Iterator[None]:
    """Set torch's engine while weights are packed; running packed weights does not need it.

    The setting is process-wide, so only one thread packs at a time.
    """
    with _packing:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            yield
        finally:
            torch.backends.quantized.engine = before
