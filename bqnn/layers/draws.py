"""Random modules, and the draw that all of them share during one prediction.

A draw belongs to the call that makes it: it is held in a context variable and not on the layers, so
that any number of threads can predict with one network at the same time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn


class Stochastic(nn.Module):
    """A module whose output is random in evaluation.

    Its numbers come from `bqnn.layers.noise`, which knows the generator of the draw that is held.
    """


class Drawn(Stochastic):
    """A module that is one of many possible functions, such as a layer with random weights.

    Left alone it makes a draw per call. While a draw is held, every call uses that one.
    """

    def make_draw(self, index: int) -> Any:
        """What this module keeps of draw number `index` while it is held."""
        raise NotImplementedError

    def held(self) -> Any:
        """What `make_draw` returned for the draw that this thread holds, None without one."""
        draw = _held.get()
        return None if draw is None else draw.kept.get(self)


class DrawnWeights(Drawn):
    """Base class of layers with random weights. Subclasses implement `draw`."""

    def draw(self) -> Any:
        """One draw of the weights, in the form that `forward` needs."""
        raise NotImplementedError

    def weights(self) -> Any:
        """The draw that is held, or a new one."""
        held = self.held()
        return self.draw() if held is None else held

    def make_draw(self, index: int) -> Any:
        return self.draw()


class Draw:
    """A draw of all random modules of a network: what each keeps, and the source of its noise."""

    def __init__(self, generator: torch.Generator | None, kept: dict[nn.Module, Any]) -> None:
        self.generator = generator
        self.kept = kept


_held: ContextVar[Draw | None] = ContextVar("held_draw", default=None)


def held_generator() -> torch.Generator | None:
    """The generator of the draw that this thread holds; None: torch's global one."""
    draw = _held.get()
    return None if draw is None else draw.generator


@contextmanager
def held_draw(
    net: nn.Module, index: int, generator: torch.Generator | None = None
) -> Iterator[None]:
    """Hold draw number `index` of every random module of `net`, in this thread.

    Args:
        net: The network; in eval mode.
        index: The number of the draw, from 0. Members of an ensemble are chosen by it.
        generator: A generator on the CPU, from which all noise is drawn while the draw is held, on
            any device. Without one noise comes from torch's global generators.
    """
    outer = _held.get()
    draw = Draw(generator, {} if outer is None else dict(outer.kept))
    token = _held.set(draw)
    try:
        for module in net.modules():
            if isinstance(module, Drawn):
                draw.kept[module] = module.make_draw(index)
        yield
    finally:
        _held.reset(token)
