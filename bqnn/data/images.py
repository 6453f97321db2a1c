"""ImageData: base class of image data sets, kept as uint8 and augmented in whole batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bqnn.arguments import ArgumentError
from bqnn.data.base import TensorData
from bqnn.data.normalization import Normalization, normalize_channels


class ImageData(TensorData):
    """Base class for image classification, with uint8 images [N, C, H, W] and int64 targets [N].

    Args:
        data_dir: The folder of data files.
        seed: Seed of the validation split and of the order of training batches.
        batch_size: The number of rows in a training batch.
        validation_share: The share of training rows for validation.
        mean: Mean of each channel, for pixels in [0, 1]; None for 0.
        std: Standard deviation of each channel; None for 1.
        crop_padding: Black pixels added on each side before a random crop.
        flip: Whether to mirror half of the training images.
    """

    white = 255  # the largest pixel value, which `normalize` maps to 1
    class_names: list[str]

    def __init__(
        self,
        *,
        data_dir: str,
        seed: int,
        batch_size: int,
        validation_share: float,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop_padding: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            seed=seed,
            batch_size=batch_size,
            validation_share=validation_share,
        )
        if (mean is None) != (std is None) or len(mean or ()) != len(std or ()):
            raise ArgumentError(
                f"mean={mean}, std={std}: normalization needs both, with one number per channel; "
                "give both or neither",
                *("mean", "std"),
            )
        if not all(value > 0 for value in std or ()):
            raise ArgumentError(
                f"std={std}: pixels are divided by it; choose numbers above 0", "std"
            )
        if crop_padding < 0:
            raise ArgumentError(
                f"crop_padding={crop_padding}: a number of pixels; choose 0 or more", "crop_padding"
            )
        self.mean = mean
        self.std = std
        self.crop_padding = crop_padding
        self.flip = flip

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        channels = self.train.inputs.shape[1]
        if self.mean is not None and len(self.mean) != channels:
            raise ArgumentError(
                f"mean={self.mean}: {len(self.mean)} numbers for images of {channels} channels; "
                "give one per channel",
                "mean",
            )

    def facts(self) -> dict[str, object]:
        channels = self.train.inputs.shape[1]
        return {
            "likelihood": "classification",
            "class_names": list(self.class_names),
            **Normalization(
                self.mean or [0.0] * channels, self.std or [1.0] * channels, self.white
            ).facts(),
            "input_shape": list(self.train.inputs.shape[1:]),
            "num_train": len(self.train),
        }

    def normalize(self, inputs: Tensor) -> Tensor:
        """Normalize images for the network.

        Args:
            inputs: Images [..., C, H, W], in uint8, or floats in [0, 1].

        Returns:
            (x - mean) / std in float32, with x in [0, 1].
        """
        images = inputs if inputs.is_floating_point() else inputs.float() / self.white
        if self.mean is None or self.std is None:
            return images
        return normalize_channels(images, self.mean, self.std)

    def augment(self, inputs: Tensor) -> Tensor:
        if self.crop_padding:
            inputs = random_crop(inputs, self.crop_padding)
        return random_flip(inputs) if self.flip else inputs


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift each image by up to `padding` pixels at random, and fill with black.

    Args:
        images: Images [B, C, H, W].
        padding: The largest shift, in pixels.

    Returns:
        Images [B, C, H, W].

    Examples:
        >>> random_crop(torch.ones(2, 3, 8, 8), padding=1).shape
        torch.Size([2, 3, 8, 8])
    """
    count, _, height, width = images.shape
    padded = F.pad(images, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, top, left, H, W], a view
    top, left = torch.randint(2 * padding + 1, (2, count), device=images.device)
    return windows[torch.arange(count, device=images.device), :, top, left]


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image [B, C, H, W] horizontally with probability 1/2.

    Examples:
        >>> random_flip(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    coins = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(coins, images.flip(-1), images)
