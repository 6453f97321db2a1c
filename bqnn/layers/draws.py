"""Random modules that can hold one draw while it passes over many batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Stochastic(nn.Module):
    """A module whose output is random in evaluation."""


class Drawn(Stochastic):
    """A module that is one of many possible functions, such as a layer with random weights.

    Left alone it makes a draw per call. While a draw is held, every call uses that one.
    """

    def hold_draw(self, index: int) -> None:
        """Make draw number `index` and use it until `release_draw`."""
        raise NotImplementedError

    def release_draw(self) -> None:
        raise NotImplementedError


class DrawnWeights(Drawn):
    """A layer whose weights are random: all that is left to say is how `draw` makes them."""

    _held: Any = None

    def draw(self) -> Any:
        """One draw of the weights, in the form that `forward` needs."""
        raise NotImplementedError

    def weights(self) -> Any:
        """The draw that is held, or a new one."""
        return self.draw() if self._held is None else self._held

    def hold_draw(self, index: int) -> None:
        self._held = self.draw()

    def release_draw(self) -> None:
        self._held = None


@contextmanager
def held_draw(net: nn.Module, index: int) -> Iterator[None]:
    """Hold draw number `index` of every random module of `net`."""
    drawn = [module for module in net.modules() if isinstance(module, Drawn)]
    try:
        for module in drawn:
            module.hold_draw(index)
        yield
    finally:
        for module in drawn:
            module.release_draw()
