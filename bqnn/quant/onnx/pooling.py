"""Average pooling as sums over windows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bqnn.seeds import Stream, stream_seed

MOST_PIXELS = 2**12  # of an image whose windows are averaged: their matrix has its square


@dataclass(frozen=True, eq=False)
class Averages:
    """The windows of an average pooling of images [N, C, H, W].

    Attributes:
        windows: Whether a pixel is in a window [H W, windows].
        divisors: What the sum of each window is divided by in turn, each [windows].
        flat_shape: The shape of the images with their pixels in a row.
        output_shape: The shape of the outputs. Its first entry is -1.
    """

    windows: Tensor
    divisors: tuple[Tensor, ...]
    flat_shape: np.ndarray
    output_shape: np.ndarray

    @property
    def is_global(self) -> bool:
        """Whether there is one window, with all pixels."""
        return self.windows.shape[1] == 1 and bool(self.windows.all())

    @classmethod
    def of(cls, pool: Callable[[Tensor], Tensor], example: Tensor, name: str) -> "Averages":
        """Measure the windows of a pooling.

        Args:
            pool: The pooling.
            example: Images of the size that it gets [N, C, H, W].
            name: The name of the module, for errors.

        Raises:
            TypeError: The pooling is not an average.

        Examples:
            >>> averages = Averages.of(torch.nn.AvgPool2d(2), torch.zeros(3, 1, 2, 4), "pool")
            >>> averages.windows.int().T
            tensor([[1, 1, 0, 0, 1, 1, 0, 0],
                    [0, 0, 1, 1, 0, 0, 1, 1]], dtype=torch.int32)
        """
        _, channels, height, width = example.shape
        output = pool(example.contiguous())
        windows, divisor = _windows(pool, height, width, output[0, 0].numel(), name)
        generator = torch.Generator().manual_seed(stream_seed(0, Stream.COMPARISON))
        images = torch.randint(-255, 256, (64, 1, height, width), generator=generator).float()
        sums, expected = images.flatten(1) @ windows.float(), pool(images).flatten(1)
        for divisors in ((divisor,), *_by_sides(windows, height, width)):
            means = sums
            for each in divisors:
                means = means / each
            if torch.equal(means, expected):
                flat = np.array([-1, channels, height * width], np.int64)
                shape = np.array([-1, *output.shape[1:]], np.int64)
                return cls(windows, divisors, flat, shape)
        raise TypeError(f"export: {name} cannot be exported, because it is not an average")


def _windows(
    pool: Callable[[Tensor], Tensor], height: int, width: int, count: int, name: str
) -> tuple[Tensor, Tensor]:
    """Measure which pixels are in each window, and what their sums are divided by."""
    size = height * width
    if count == 1:
        return torch.ones(size, 1, dtype=torch.bool), torch.tensor([float(size)])
    if size > MOST_PIXELS:
        raise TypeError(
            f"export: {name} cannot be exported, because it averages windows of an image of "
            f"{height}x{width}, and an export allows {MOST_PIXELS} pixels"
        )
    pixels = torch.eye(size, dtype=torch.float64).view(-1, 1, height, width)
    shares = pool(pixels).flatten(1)  # 1 / divisor inside of a window
    return shares > 0, (1 / shares.amax(0)).round().float()


def _by_sides(windows: Tensor, height: int, width: int) -> list[tuple[Tensor, ...]]:
    """Return the heights and the widths of windows, by which adaptive pooling divides in turn."""
    pixels = windows.view(height, width, -1)
    return [(pixels.any(1).sum(0).float(), pixels.any(0).sum(0).float())]
