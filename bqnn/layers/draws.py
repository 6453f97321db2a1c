"""Draws of a network's random modules. A draw belongs to a call, not to the modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.layers.noise import coins_like, cpu_noise_like


class Draw:
    """One draw of a network while it is held.

    Args:
        generator: of the CPU, where its random numbers come from.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.values: dict[nn.Module, Any] = {}  # what each `Drawn` module made


# Of this thread (and asyncio task) alone: threads that predict with one network share no draw.
_held: ContextVar[Draw | None] = ContextVar("held draw", default=None)


class Stochastic(nn.Module):
    """A module whose output is random in evaluation.

    Its random numbers come from `evaluation_noise` and `evaluation_coins`, so that they belong to
    the draw that is held.
    """


class Drawn(Stochastic):
    """Base class for modules that represent a distribution over functions.

    By default, each call makes a draw. While a draw is held, all calls use it.
    """

    def make_draw(self, index: int) -> Any:
        """Make draw number `index`, in the form that `forward` needs; never None."""
        raise NotImplementedError

    def held(self) -> Any:
        """This module's part of the draw that this thread holds, or None."""
        draw = _held.get()
        return None if draw is None else draw.values.get(self)


class DrawnWeights(Drawn):
    """Base class for layers with random weights. Subclasses implement `draw`."""

    def draw(self) -> Any:
        """One draw of the weights, in the form that `forward` needs."""
        raise NotImplementedError

    def weights(self) -> Any:
        """Return the held draw or a new one; torch.export would turn a held one into a constant."""
        held = None if torch.compiler.is_exporting() else self.held()
        return self.draw() if held is None else held

    def make_draw(self, index: int) -> Any:
        return self.draw()


@contextmanager
def held_draw(
    net: nn.Module, index: int, generator: torch.Generator | None = None
) -> Iterator[None]:
    """Hold draw number `index` of every random module of `net`, for this thread.

    Args:
        net: the network. Draws that are held for other networks stay held.
        index: the number of the draw, which says which member of an ensemble answers.
        generator: of the CPU, for all random numbers of the draw; by default torch's global one.
    """
    draw = Draw(torch.default_generator if generator is None else generator)
    outer = _held.get()
    if outer is not None:
        draw.values.update(outer.values)
    token = _held.set(draw)
    try:
        for module in net.modules():
            if isinstance(module, Drawn):
                draw.values[module] = module.make_draw(index)
        yield
    finally:
        _held.reset(token)


def evaluation_noise(like: Tensor) -> Tensor:
    """N(0, 1) noise of the shape, layout, type and device of a tensor, for a draw of weights.

    The numbers come from a generator of the CPU, that of the draw that is held or the global one,
    and in the order of the shape: a draw is the same network on every device and in every layout.
    """
    if torch.compiler.is_compiling():
        return torch.randn_like(like)
    draw = _held.get()
    generator = torch.default_generator if draw is None else draw.generator
    return cpu_noise_like(like, generator)


def evaluation_coins(like: Tensor, probability: float) -> Tensor:
    """True with this probability: bool, the shape of a tensor and on its device.

    As `evaluation_noise`, on the CPU.
    """
    draw = None if torch.compiler.is_exporting() else _held.get()
    if draw is not None:
        return _coins_of(draw, like, probability)
    return coins_like(like, probability, torch.default_generator)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _coins_of(draw: Draw, like: Tensor, probability: float) -> Tensor:
    return coins_like(like, probability, draw.generator)
