"""Normalize rows in the units of the data to inputs of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def standardize(inputs: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x - mean) / std in float32."""
    return ((inputs - mean) / std).float()


def normalize_channels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (x - mean) / std of each channel of images [..., C, H, W] in [0, 1]."""
    channel_mean = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    channel_std = torch.tensor(std, device=images.device).view(-1, 1, 1)
    return (images - channel_mean) / channel_std


@dataclass(frozen=True)
class Normalization:
    """The normalization of a data set, as the facts of a checkpoint store it.

    Attributes:
        mean: The mean of each feature, or of each channel for pixels in [0, 1].
        std: The standard deviation of each feature or channel.
        scale: The largest value of a pixel; None if the values have no scale, as those of tables.

    Examples:
        >>> normalization = Normalization([0.5], [0.5], scale=255.0)
        >>> normalization(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)).item()
        1.0
    """

    mean: Sequence[float]
    std: Sequence[float]
    scale: float | None = None

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Normalization | None:
        """Return the normalization that facts describe, or None if they have none."""
        if "input_mean" not in facts:
            return None
        return cls(facts["input_mean"], facts["input_std"], facts.get("input_scale"))

    def facts(self) -> dict[str, object]:
        """Return the entries of `TensorData.facts` from which `from_facts` makes it again."""
        scale = {} if self.scale is None else {"input_scale": float(self.scale)}
        return {"input_mean": list(self.mean), "input_std": list(self.std), **scale}

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalize rows [N, ...], as the data set does for its training rows.

        Args:
            rows: Features [N, F], or images [N, C, H, W], with pixels from 0 to `scale` if there is
                a scale.

        Returns:
            The inputs of the network in float32, shaped like the rows.
        """
        if self.scale is not None:
            return normalize_channels(rows.float() / self.scale, self.mean, self.std)
        shape = [-1, *[1] * (rows.dim() - 2)]  # one number per feature or channel
        mean, std = (
            torch.tensor(each, dtype=torch.float64).view(shape) for each in (self.mean, self.std)
        )
        return standardize(rows.double(), mean, std)
