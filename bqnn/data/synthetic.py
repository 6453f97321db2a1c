"""SyntheticData: one-dimensional regression whose mean and noise are known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bqnn.arguments import ArgumentError
from bqnn.data.base import Rows
from bqnn.data.tables import TableData
from bqnn.text import short

Function = Callable[[Tensor], tuple[Tensor, Tensor]]


class SyntheticData(TableData):
    """Draws of y = mean(x) + std(x) * noise, from a data seed of their own.

    `gap`: a wave whose noise grows with x, with no inputs between -1 and 1.
    `linear`: y = 2 x + 8 with noise of standard deviation 1.
    Inputs lie between -4 and 4. `data_seed` fixes the rows; `seed` only which of them validate.
    """

    def __init__(
        self,
        function: str = "gap",
        num_train: int = 500,
        num_test: int = 200,
        *,
        data_seed: int = 0,
        data_dir: str = "data",
        seed: int = 0,
        batch_size: int = 100,
        validation_share: float = 0.2,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            seed=seed,
            batch_size=batch_size,
            validation_share=validation_share,
        )
        if function not in _FUNCTIONS:
            raise ArgumentError(
                f"function={short(function)}: no such function; choose one of "
                f"{', '.join(_FUNCTIONS)}",
                "function",
            )
        for name, count in (("num_train", num_train), ("num_test", num_test)):
            if count < 1:
                raise ArgumentError(f"{name}={count}: nothing is drawn; choose 1 or more", name)
        self.function = function
        self.num_train = num_train
        self.num_test = num_test
        self.data_seed = data_seed

    def truth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and noise standard deviation at `x`, shaped as `x`, all in original units."""
        function, _ = _FUNCTIONS[self.function]
        return function(x)

    def grid(self, num_points: int = 500) -> Tensor:
        """Inputs to plot at, in original units: float64 [P, 1], half as wide again as the data.

        `standardize(grid)` is what the network reads.
        """
        return torch.linspace(-6, 6, num_points, dtype=torch.float64).unsqueeze(1)

    def _read(self) -> tuple[Rows, Rows]:
        generator = torch.Generator().manual_seed(self.data_seed)
        return self._draw(self.num_train, generator), self._draw(self.num_test, generator)

    def _draw(self, num_rows: int, generator: torch.Generator) -> Rows:
        _, gap = _FUNCTIONS[self.function]
        uniform = torch.rand(num_rows, generator=generator, dtype=torch.float64)
        distance = (2 * uniform - 1) * (4 - gap)
        x = distance + distance.sign() * gap
        mean, std = self.truth(x)
        noise = torch.randn(num_rows, generator=generator, dtype=torch.float64)
        return Rows(x.unsqueeze(1), mean + std * noise)


def _wave(x: Tensor) -> tuple[Tensor, Tensor]:
    return x / 2 + 2 * torch.sin(1.5 * x), 0.1 + 0.5 * torch.sigmoid(x)


def _line(x: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x + 8, torch.ones_like(x)


# The function, and how far from 0 its inputs begin.
_FUNCTIONS: dict[str, tuple[Function, float]] = {"gap": (_wave, 1.0), "linear": (_line, 0.0)}
