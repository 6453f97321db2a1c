"""The contract of an engine: how it packs and runs layers, how it rounds, what it supports."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from bqnn.layers.linear_map import Geometry
from bqnn.quant.engines.rounding import Rounding
from bqnn.quant.fake_quant import FakeQuant


class ActivationGrid(NamedTuple):
    """The grid of an activation, x = scale * (integer - zero_point), as Python numbers.

    Attributes:
        scale: The step of the grid.
        zero_point: The integer of x = 0.
        quant_max: The largest integer; the smallest is 0.

    Examples:
        >>> ActivationGrid(scale=0.5, zero_point=0, quant_max=127).quant_max
        127
    """

    scale: float
    zero_point: int
    quant_max: int

    @classmethod
    def of(cls, quant: FakeQuant) -> Self:
        """Return the grid of a fake quantizer of activations."""
        return cls(float(quant.scale), int(quant.zero_point), quant.quant_max)


class Weight(NamedTuple):
    """The integer weights of a layer, and its bias.

    Attributes:
        integers: Integers [C, ...] in int8.
        scale: The steps of their grids, [C] or [1].
        zero_point: The integers of 0, [C] or [1].
        bias: The bias [C] in float32, or None.
        geometry: The geometry of a convolution; None for a linear layer.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    geometry: Geometry | None

    @property
    def centered(self) -> Tensor:
        """The integers minus their zero points, in float32."""
        zero_point = FakeQuant.along(self.integers, self.zero_point)
        return self.integers.float().sub_(zero_point)


class Layer(NamedTuple):
    """The properties of a layer that select a kernel, besides the input shape.

    Attributes:
        weight: Shape of the weights.
        geometry: Geometry of the convolution; None for a linear layer.
        per_channel: Whether each output channel has its own scale.
        has_bias: Whether there is a bias.
        relu: Whether the kernel applies a ReLU.
        is_zero: Whether the zero points of weights, inputs and outputs are zero.
        other_is_zero: Whether the zero point of the activations that the kernel adds to its
            output is zero; None if it adds none.
    """

    weight: tuple[int, ...]
    geometry: Geometry | None
    per_channel: bool
    has_bias: bool
    relu: bool
    is_zero: tuple[bool, bool, bool]
    other_is_zero: bool | None = None


class Packed(ABC):
    """Weights in the form that an engine runs. They can be pickled and copied."""

    @abstractmethod
    def __call__(self, x: Tensor, relu: bool, output: ActivationGrid) -> Tensor:
        """Run the layer.

        Args:
            x: Activations in the form of the engine, [..., F] or [B, C, H, W].
            relu: Whether a ReLU follows.
            output: The grid of the outputs.
        """

    def add(self, x: Tensor, other: Tensor, relu: bool, output: ActivationGrid) -> Tensor:
        """Run the layer, and add other activations to its output before it is rounded.

        Only engines that add within layers implement it.

        Args:
            x: Activations in the form of the engine.
            other: Activations in that form, shaped like the outputs.
            relu: Whether a ReLU follows the sum.
            output: The grid of the sum.
        """
        raise NotImplementedError


class Engine(ABC):
    """How an int8 network is executed.

    A simulation asks `rounding`, `fuses_sums` and `adds_within_layers`, so that it computes the
    same integers.

    Attributes:
        name: The name in a QuantSpec.
        fuses_sums: Whether a residual sum rounds as `rounding.fused_sum`, not as `plain_sum`.
        adds_within_layers: Whether the kernel of a layer adds other activations to its output
            before it rounds, as `rounding.sum_within_layer`.
    """

    name: str
    fuses_sums = False
    adds_within_layers = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle an engine as its name: there is one of each."""
        from bqnn.quant.engines import engine

        return engine, (self.name,)

    def missing(self) -> str | None:
        """Return why the engine cannot run on this machine, or None if it can."""
        return None

    @abstractmethod
    def rounding(self, layer: Layer, inputs: Sequence[int]) -> Rounding:
        """Return how the kernel of a layer rounds.

        Args:
            layer: The properties of the layer.
            inputs: Shape of the inputs, [N, F] or [B, C, H, W].
        """

    @abstractmethod
    def can_be_wrong(self, layer: Layer, weight_bits: int, activation_bits: int) -> bool:
        """Return whether the sums of a layer can be wrong on this CPU.

        They may saturate, or the kernel may have an error.

        Args:
            layer: The properties of the layer.
            weight_bits: Bit width of the weights.
            activation_bits: Bit width of the inputs.
        """


class WholeNetwork(nn.Module):
    """Base class of networks that an engine runs as a whole."""

    def integers(self, x: Tensor) -> dict[str, Tensor]:
        """Return the outputs of all modules that round, by name, as integers."""
        raise NotImplementedError


class NetworkEngine(Engine):
    """An engine that executes a network as a whole."""

    @abstractmethod
    def network(self, simulated: nn.Module) -> WholeNetwork:
        """Return a network that executes the integers of a simulated one.

        Args:
            simulated: The network, in evaluation mode and on the CPU.
        """


class LayerEngine(Engine):
    """An engine that executes layer by layer.

    The activations of a network have a form that belongs to its engine, such as torch's quantized
    tensors.
    """

    @abstractmethod
    def pack(self, weight: Weight) -> Packed:
        """Pack weights."""

    @abstractmethod
    def quantize(self, x: Tensor, grid: ActivationGrid) -> Tensor:
        """Convert floats to activations on a grid."""

    @abstractmethod
    def wrap(self, integers: Tensor, scale: float, zero_point: int) -> Tensor:
        """Return activations for integers in uint8, in the same memory layout."""

    @abstractmethod
    def holds(self, x: Any) -> bool:
        """Return whether `x` is an activation in the form of the engine."""

    @abstractmethod
    def integers(self, x: Tensor) -> Tensor:
        """Return the integers of activations, in uint8."""

    @abstractmethod
    def grid(self, x: Tensor) -> tuple[float, int]:
        """Return scale and zero point of activations."""

    @abstractmethod
    def dequantize(self, x: Tensor) -> Tensor:
        """Convert activations to floats."""

    @abstractmethod
    def add(self, x: Tensor, y: Tensor, output: ActivationGrid, relu: bool) -> Tensor:
        """Compute x + y, or relu(x + y), on a grid."""

    def moved(self, x: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function that moves or selects integers to activations.

        Args:
            x: Activations.
            move: A function of integers in uint8.
        """
        return self.wrap(move(self.integers(x)), *self.grid(x))

    def keep(self, x: Tensor, kept: Tensor, factor: float) -> Tensor:
        """Multiply activations by `factor` where `kept` is True, and by zero elsewhere; exact.

        The factor multiplies the scale, and dropped values become the zero point.

        Args:
            x: Activations.
            kept: Booleans that broadcast over `x`.
            factor: The factor.
        """
        scale, zero_point = self.grid(x)
        integers = self.integers(x)
        if zero_point == 0:
            out = integers * kept
        else:  # arithmetic of uint8 wraps modulo 256, which cancels in the two shifts
            out = (integers - zero_point).mul_(kept).add_(zero_point)
        return self.wrap(out, scale * factor, zero_point)

    def centered(self, x: Tensor) -> Tensor:
        """Return integer - zero_point of activations, in float32."""
        return self.integers(x).float() - self.grid(x)[1]

    def like(self, floats: Tensor, x: Tensor) -> Tensor:
        """Return activations for floats on the grid and in the memory layout of others."""
        scale, zero_point = self.grid(x)
        integers = (floats / floats.new_tensor(scale)).round_().add_(zero_point)
        return self.wrap(integers.to(torch.uint8, memory_format=layout(x)), scale, zero_point)


class IntegerOutput(nn.Module):
    """Base class of modules that compute integers on a grid.

    Attributes:
        engine: The engine whose activations the module reads and returns.
        grid: The grid of the outputs.
    """

    engine: LayerEngine
    grid: ActivationGrid


def layout(x: Tensor) -> torch.memory_format:
    """Return channels_last for images in that layout, and contiguous_format otherwise."""
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def is_dense(x: Tensor) -> bool:
    """Return whether the elements of a tensor fill its memory without gaps or repetition."""
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )


def output_shape(
    inputs: Sequence[int], weight: Sequence[int], geometry: Geometry | None
) -> tuple[int, ...]:
    """Return the shape of the outputs of a layer.

    Args:
        inputs: Shape of the inputs, [..., F] or [B, C, H, W].
        weight: Shape of the weights.
        geometry: Geometry of the convolution; None for a linear layer.

    Examples:
        >>> output_shape((2, 3, 8, 8), (5, 3, 3, 3), Geometry((2, 2), (1, 1), (1, 1), 1))
        (2, 5, 4, 4)
    """
    if geometry is None:
        return (*inputs[:-1], weight[0])
    reaches = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, weight[2:], strict=True)]
    sides = zip(inputs[2:], geometry.padding, reaches, geometry.stride, strict=True)
    return (inputs[0], weight[0], *((n + 2 * p - reach) // s + 1 for n, p, reach, s in sides))


def check_inputs(
    shape: Sequence[int], weight: Sequence[int], geometry: Geometry | None, path: str
) -> None:
    """Check the shape of the inputs of a layer.

    Args:
        shape: Shape of the inputs, [..., F] or [B, C, H, W].
        weight: Shape of the weights.
        geometry: Geometry of the convolution; None for a linear layer.
        path: The name of the layer in the network.

    Raises:
        ValueError: The layer does not take this shape.

    Examples:
        >>> check_inputs((2, 3), (5, 4), None, "output")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: output takes inputs [..., 4], not of shape (2, 3); pass inputs of ...
    """
    if geometry is None:
        if len(shape) == 0 or shape[-1] != weight[1]:
            raise ValueError(
                f"{path} takes inputs [..., {weight[1]}], not of shape {tuple(shape)}; pass inputs "
                "of the shape that the network was trained with"
            )
        return
    channels = weight[1] * geometry.groups
    if len(shape) != 4:
        raise ValueError(
            f"inputs of shape {tuple(shape)}: {path}, a quantized convolution, takes "
            f"[B, {channels}, H, W]; add the batch dimension with x[None]"
        )
    if shape[1] != channels:
        raise ValueError(
            f"{path} takes inputs [B, {channels}, H, W], not of shape {tuple(shape)}; pass images "
            f"with {channels} channels"
        )
    if min(output_shape(shape, weight, geometry)[2:]) < 1:
        raise ValueError(
            f"{path}, a convolution with a kernel of {weight[2]}x{weight[3]}, takes larger inputs "
            f"than those of shape {tuple(shape)}; pass inputs of the shape that the network was "
            "trained with"
        )


def region_inputs(x: Tensor, path: str) -> Tensor:
    """Return the inputs of the integers in float32.

    Args:
        x: The inputs.
        path: The name of the Enter that reads them.

    Raises:
        TypeError: The inputs are not floats.

    Examples:
        >>> region_inputs(torch.ones(1, dtype=torch.float64), "enter")
        tensor([1.])
    """
    if not x.is_floating_point():
        raise TypeError(
            f"{path or 'Enter'} reads {x.dtype}, but the integer region takes floats; convert the "
            "inputs with float()"
        )
    return x.float()


def in_batch(x: Tensor, is_conv: bool) -> Tensor:
    """Reshape inputs for a kernel: [..., F] -> [N, F]; images [B, C, H, W] are unchanged."""
    return x if is_conv or x.dim() == 2 else x.reshape(-1, x.shape[-1])
