"""SyntheticData: one-dimensional regression with known mean and noise."""

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
    """Samples of y = mean(x) + std(x) * eps with eps ~ N(0, 1) and x in [-4, 4].

    Args:
        function: `gap`, a wave whose noise grows with x, without inputs between -1 and 1; or
            `linear`, y = 2 x + 8 with std 1.
        num_train: The number of training rows, including validation rows.
        num_test: The number of test rows.
        data_seed: Seed of the rows.
        data_dir: Unused, common to all data sets.
        seed: Seed of the validation split and of the order of training batches.
        batch_size: The number of rows in a training batch.
        validation_share: The share of training rows for validation.

    Examples:
        >>> data = SyntheticData("linear")
        >>> data.truth(torch.tensor([1.0]))
        (tensor([10.]), tensor([1.]))
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
                f"function={short(function)}: unknown function; choose one of "
                f"{', '.join(_FUNCTIONS)}",
                "function",
            )
        for name, count in (("num_train", num_train), ("num_test", num_test)):
            if count < 1:
                raise ArgumentError(f"{name}={count}: a number of rows; choose 1 or more", name)
        self.function = function
        self.num_train = num_train
        self.num_test = num_test
        self.data_seed = data_seed

    def truth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of y, shaped like `x`, in original units."""
        function, _ = _FUNCTIONS[self.function]
        return function(x)

    def grid(self, num_points: int = 500) -> Tensor:
        """Return inputs for plots, from -6 to 6 in original units, in float64 [P, 1].

        `standardize` converts them for the network.
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


# The function, and the smallest |x| of its inputs.
_FUNCTIONS: dict[str, tuple[Function, float]] = {"gap": (_wave, 1.0), "linear": (_line, 0.0)}
