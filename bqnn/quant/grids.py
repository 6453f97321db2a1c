"""Activations that know the grid they lie on, so that a layer can compute with their integers."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from bqnn.layers.dropout import MCDropout


class Grid(NamedTuple):
    """x = scale * (integer - zero_point), with |integer - zero_point| <= largest."""

    scale: float
    zero_point: int
    largest: int


def on_grid(x: Tensor, grid: Grid) -> Tensor:
    """`x` itself, marked."""
    x._grid = grid  # type: ignore[attr-defined]
    return x


def grid_of(x: Tensor) -> Grid | None:
    """The grid that an activation was marked with; arithmetic on it does not pass it on."""
    return getattr(x, "_grid", None)


def carry_grids(net: nn.Module) -> None:
    """Have the layers that change no step of a grid, or only its scale, pass it on."""
    for module in net.modules():
        if isinstance(module, nn.MaxPool2d | nn.Flatten | nn.ReLU | MCDropout):
            module.register_forward_hook(_carry)


def _carry(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    grid = grid_of(inputs[0])
    if grid is None or output is inputs[0]:
        return
    if isinstance(module, MCDropout):
        grid = grid._replace(scale=grid.scale / (1 - module.rate))
    on_grid(output, grid)
