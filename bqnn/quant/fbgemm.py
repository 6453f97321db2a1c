"""The backend: fake quantizers that choose ranges, and torch's int8 operators.

Nothing else in the package touches torch.ao or torch.ops.quantized. Upstream calls torch.ao
deprecated and has no other int8 convolution for the CPU. To do without it, replace in this file
the observers of `_observer` (minimum and maximum, running or averaged, and the search of a
histogram's best range) and the calls of torch.ops.quantized in `PackedWeight` and `add_relu`; the
rounding in `FakeQuant` uses core operators already.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverBase,
)

from bqnn.arguments import ArgumentError
from bqnn.layers.linear_map import Geometry
from bqnn.quant.grids import Grid

_packing = Lock()  # torch keeps one engine for the whole process
SMALLEST_SCALE = 2.0**-60  # torch's own floor, 2**-23, rounds small standard deviations to zero


class FakeQuant(nn.Module):
    """Rounds to a grid of integers times a scale, and gives back floats.

        x_q = scale * (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point)

    The gradient passes where x is inside the range (straight-through). In training mode its
    observer watches what comes by and sets scale and zero point, until it is `frozen`. While it is
    not `enabled` it rounds nothing. scale and zero_point are [1], or [C] with a grid for each
    channel of dimension 0.
    """

    scale: Tensor
    zero_point: Tensor
    observer: ObserverBase | None

    def __init__(
        self, observer: ObserverBase | None, quant_min: int, quant_max: int, channels: int | None
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
        """Take what comes by into account, in training mode."""
        if not self.training or self.frozen or self.observer is None:
            return
        self.observer(_extremes_of_all_ranks(x.detach(), self.channels))
        if not isinstance(self.observer, HistogramObserver):  # its search takes long: see settle
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Set scale and zero point from what was watched, if anything was."""
        if self.observer is None:
            return
        smallest: Any = self.observer.min_val  # empty or infinite as long as nothing was seen
        if smallest.numel() == 0 or smallest.isinf().any():
            return
        if smallest.isnan().any():  # then the loss is NaN, whose message says more than torch 2.9's
            self.scale.fill_(torch.nan)
            return
        scale, zero_point = self.observer.calculate_qparams()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def round(self, x: Tensor) -> Tensor:
        """The nearest point of the grid, or x itself while this is not enabled."""
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
        """The integer of each point of `x`, shaped like it, in an 8-bit type."""
        integers = (self.round(x) / self.along(x, self.scale)).round_()
        integers += self.along(x, self.zero_point)
        return integers.to(torch.int8 if self.quant_min < 0 else torch.uint8)

    def dequantize(self, integers: Tensor) -> Tensor:
        """The floats that integers stand for, bit for bit those that `round` gives."""
        offset = integers.to(self.scale.dtype).sub_(self.along(integers, self.zero_point))
        return offset.mul_(self.along(integers, self.scale))

    @property
    def largest(self) -> int:
        """The largest distance of an integer of this grid from the zero point."""
        ends = (self.quant_min - self.zero_point, self.quant_max - self.zero_point)
        return max(int(end.abs().max()) for end in ends)

    @property
    def bits(self) -> int:
        return (self.quant_max - self.quant_min).bit_length()

    @property
    def has_range(self) -> bool:
        """Whether any data was seen (or the grid was given)."""
        return bool((self.scale > 0).all())

    @staticmethod
    def along(x: Tensor, values: Tensor) -> Tensor:
        """[C] values in the shape that broadcasts over dimension 0 of x."""
        return values.reshape(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"{self.quant_min} to {self.quant_max}, channels={self.channels}"


def _extremes_of_all_ranks(x: Tensor, channels: int | None) -> Tensor:
    """Where several processes train one model: the minimum and maximum over what all of them see.

    All that observers in training look at, so that ranges stay equal everywhere. [2], or [C, 2].
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
    """A fake quantizer to `bits` bits, for all of a tensor or for each of its `channels`.

    observer: `minmax` of the newest tensor, `running_minmax` of all, `moving_average` of the
    minimum and maximum of tensors, or `histogram`, the range with the least squared error.
    """
    low = -(2 ** (bits - 1)) if signed else 0
    high = low + 2**bits - 1
    options = {
        "dtype": torch.qint8 if signed else torch.quint8,
        "quant_min": low,
        "quant_max": high,
        "eps": SMALLEST_SCALE,
    }
    return FakeQuant(_observer(observer, symmetric, channels, options), low, high, channels)


def make_fixed_fake_quant(bits: int, largest: float) -> FakeQuant:
    """A symmetric fake quantizer whose largest integer stands for `largest`; it never watches."""
    high = 2 ** (bits - 1) - 1
    quant = FakeQuant(None, -high, high, None)
    quant.scale.fill_(largest / high)
    return quant


def _observer(
    kind: str, symmetric: bool, channels: int | None, options: dict[str, Any]
) -> ObserverBase:
    scheme = "symmetric" if symmetric else "affine"
    if channels is not None:
        options = {**options, "qscheme": getattr(torch, f"per_channel_{scheme}")}
        constants = {"minmax": 1.0, "moving_average": 0.01}
        return MovingAveragePerChannelMinMaxObserver(constants[kind], **options)
    options = {**options, "qscheme": getattr(torch, f"per_tensor_{scheme}")}
    match kind:
        case "minmax":
            return MovingAverageMinMaxObserver(1.0, **options)
        case "moving_average":
            return MovingAverageMinMaxObserver(0.01, **options)
        case "running_minmax":
            return MinMaxObserver(**options)
        case "histogram":
            observer = HistogramObserver(**options)
            # It would minimize the error of 256 levels, however few there are.
            observer.dst_nbins = options["quant_max"] - options["quant_min"] + 1
            return observer
    raise ValueError(f"observer={kind!r}: unknown")


def has_vnni() -> bool:
    """Whether this CPU has instructions that add products of 8-bit integers in 32 bits."""
    return torch.cpu._is_vnni_supported()


def can_saturate(weight_bits: int, activation_bits: int) -> bool:
    """Whether sums of two products can leave 16 bits, in which some kernels add them up."""
    return 2 * (2**activation_bits - 1) * 2 ** (weight_bits - 1) > 32_767


def check_engine(engine: str) -> None:
    """ValueError where this torch was built without the engine."""
    supported = torch.backends.quantized.supported_engines
    if engine not in supported:
        raise ArgumentError(
            f"engine={engine}: this torch has {', '.join(supported)}; choose one of these", "engine"
        )


# How a kernel rounds: see `requantize`, and bqnn/quant/kernels.py for which one does it how.
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
    """What a kernel makes of exact sums of integer products, in floats on the grid of `output`.

        fbgemm          y = s_y clamp(round((sums + bias / (s_x s_w)) * (s_x s_w / s_y)))
        fbgemm_fused    the same, with a fused multiply-add of the bias and 1 / (s_x s_w)
        onednn          y = s_y (clamp(round((sums * s_x * s_w + bias) * (1 / s_y) + z_y)) - z_y)
        onednn_product  the same, with sums * (s_x * s_w)

    in float32 and in the kernel's order of operations, so that even ties round alike.

    sums: [B, C, ...], whole numbers; bias: [C].
    """
    along = (1, -1) + (1,) * (sums.dim() - 2)
    zero_point = int(output.zero_point)
    if rounding in ("onednn", "onednn_product"):
        # It is handed inverse scales, those of a linear layer's weights among them.
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
    """sums + bias / product, as FBGEMM finds it."""
    if weight.channels is not None:
        return sums + bias / product
    if rounding == "fbgemm":
        return sums + bias * (1 / product)
    # float64 holds the product of two float32 exactly.
    return (sums.double() + bias.double() * (1 / product).double()).float()


def requantized_sum(x: Tensor, x_grid: Grid, y: Tensor, y_grid: Grid, output: FakeQuant) -> Tensor:
    """What `add_relu` makes of two activations, in floats on the grid of `output`.

    It finds scale * integer - scale * zero_point with a fused multiply-add, that is, rounded once;
    float64 holds that product exactly.
    """
    total = _multiplied_and_added(x, x_grid) + _multiplied_and_added(y, y_grid)
    zero_point = int(output.zero_point)
    steps = total.relu_().mul_(1 / output.scale).round_()
    steps.clamp_(output.quant_min - zero_point, output.quant_max - zero_point)
    return steps.mul_(output.scale)


def _multiplied_and_added(x: Tensor, grid: Grid) -> Tensor:
    scale = x.new_tensor(grid.scale)  # in the float32 that the operator computes with
    integers = (x / scale).round_() + grid.zero_point
    offset = (scale * grid.zero_point).double()
    return integers.double().mul_(scale.double()).sub_(offset).float()


def in_batch(x: Tensor, is_conv: bool) -> Tensor:
    """The inputs of a linear map in the shape that kernels take: [N, F], or [B, C, H, W].

    ValueError: pictures come without a batch dimension.
    """
    if not is_conv:
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if x.dim() != 4:
        raise ValueError(
            f"inputs {tuple(x.shape)} of a quantized convolution: it takes [B, C, H, W]; add the "
            "batch dimension with x[None]"
        )
    return x


class PackedWeight:
    """An integer weight and a float bias, packed for an engine's linear map or convolution."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: Geometry | None, engine: str
    ) -> None:
        ops = torch.ops.quantized
        self._is_conv = geometry is not None
        with _using(engine):
            if geometry is None:
                self._packed = ops.linear_prepack(weight, bias)
            else:
                self._packed = ops.conv2d_prepack(weight, bias, *geometry)

    def __call__(self, x: Tensor, relu: bool, scale: float, zero_point: int) -> Tensor:
        """The quantized output for a quantized input, at the scale and zero point given."""
        ops = torch.ops.quantized
        if self._is_conv:
            run = ops.conv2d_relu if relu else ops.conv2d
        else:
            run = ops.linear_relu if relu else ops.linear
        out = run(in_batch(x, self._is_conv), self._packed, scale, zero_point)
        return out if x.dim() == out.dim() else out.reshape(*x.shape[:-1], out.shape[-1])


def quantized_weight(weight: Tensor, quant: FakeQuant) -> Tensor:
    """A weight that lies on the grid of `quant`, as a quantized tensor."""
    if quant.channels is None:
        scale, zero_point = float(quant.scale), int(quant.zero_point)
        return torch.quantize_per_tensor(weight, scale, zero_point, torch.qint8)
    scales, zero_points = quant.scale.double(), quant.zero_point.long()
    return torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8)


class ActivationGrid:
    """The grid of an activation, in numbers that cost nothing to look up."""

    def __init__(self, quant: FakeQuant) -> None:
        self.scale = float(quant.scale)
        self.zero_point = int(quant.zero_point)
        self.quant_max = quant.quant_max
        self._largest = self.scale * (self.quant_max - self.zero_point)

    def quantize(self, x: Tensor) -> Tensor:
        """Floats as a quantized tensor."""
        return self.clamp(torch.quantize_per_tensor(x, self.scale, self.zero_point, torch.quint8))

    def clamp(self, x: Tensor) -> Tensor:
        """A quantized tensor on this grid, cut to its bits: the operators fill the container."""
        if self.quant_max == 255:
            return x
        return torch.clamp(x, max=self._largest)


def add_relu(x: Tensor, y: Tensor, grid: ActivationGrid) -> Tensor:
    """The sum of two quantized activations, with a ReLU, on a grid."""
    return grid.clamp(torch.ops.quantized.add_relu(x, y, grid.scale, grid.zero_point))


def keep_scaled(x: Tensor, kept: Tensor, factor: float) -> Tensor:
    """A quantized tensor times `factor` where it is kept, zero elsewhere: both are exact.

    The factor goes into the scale, and what is not kept becomes the zero point. kept: bool,
    broadcast over x.
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
    else:  # modulo 256, which the shift there and back does not mind
        torch.sub(source, zero_point, out=target).mul_(kept).add_(zero_point)
    return out


def _integers(x: Tensor) -> Tensor:
    """The memory of a quantized tensor, seen as uint8; `int_repr` would copy it."""
    view = torch.empty(0, dtype=torch.uint8)
    return view.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def quantized_like(x: Tensor, like: Tensor) -> Tensor:
    """Floats on the grid, and in the memory layout, of a quantized activation."""
    x = x.to(memory_format=layout(like))
    return torch.quantize_per_tensor(x, like.q_scale(), like.q_zero_point(), torch.quint8)


def layout(x: Tensor) -> torch.memory_format:
    """channels_last for pictures that are in it; contiguous_format for anything else."""
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


@contextmanager
def _using(engine: str) -> Iterator[None]:
    """Pack for an engine; running a packed weight needs no such setting.

    The engine is a setting of the process, so one thread at a time packs.
    """
    with _packing:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            yield
        finally:
            torch.backends.quantized.engine = before
