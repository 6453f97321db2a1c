"""Distorted images: five levels each of rotation, shift, brightness, noise and blur."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 1000  # the number of images at a time, which limits the memory of temporary tensors


@dataclass(frozen=True)
class Distortion:
    """A distortion of float32 images [N, C, H, W] in [0, 1], with its amounts at five levels.

    Attributes:
        change: Function of the images and an amount.
        amounts: The amounts at levels 1 to 5.
        nothing: The amount that leaves images unchanged.
    """

    change: Callable[[Tensor, float], Tensor]
    amounts: tuple[float, ...]
    nothing: float = 0.0


def distort(images: Tensor, distortion: Distortion, level: int, white: int) -> Tensor:
    """Distort images at one of five levels.

    Random distortions use the same random numbers at every level and in every call.

    Args:
        images: Images [N, C, H, W] in uint8.
        distortion: A value of `DISTORTIONS`.
        level: The level, from 1 to 5.
        white: The largest pixel value.

    Returns:
        Images [N, C, H, W] in uint8, with values from 0 to `white`.

    Examples:
        >>> image = torch.tensor([[[[0, 100, 200]]]], dtype=torch.uint8)
        >>> distort(image, DISTORTIONS["brightness"], level=1, white=255)
        tensor([[[[  0, 150, 255]]]], dtype=torch.uint8)
    """
    amount = distortion.amounts[level - 1]
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        chunks = [
            distortion.change(chunk.float() / white, amount).clamp(0, 1).mul(white).round().byte()
            for chunk in images.split(_CHUNK)
        ]
    return torch.cat(chunks)


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Rotate images counter-clockwise about the center, bilinearly, with black corners.

    Args:
        images: Images [N, C, H, W].
        degrees: The angle.
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import rotate

    return rotate(images, degrees, InterpolationMode.BILINEAR)


def shift(images: Tensor, share: float) -> Tensor:
    """Shift images right, and fill with black.

    Args:
        images: Images [N, C, H, W].
        share: The shift as a share of the width, rounded to whole pixels.

    Examples:
        >>> shift(torch.tensor([[[[1.0, 2.0, 3.0]]]]), share=1 / 3)
        tensor([[[[0., 1., 2.]]]])
    """
    width = images.shape[-1]
    pixels = round(share * width)
    return F.pad(images, (pixels, 0))[..., :width]


def brighten(images: Tensor, factor: float) -> Tensor:
    """Multiply images by a factor, and clip them at 1.

    Args:
        images: Images [N, C, H, W] in [0, 1].
        factor: The factor, 1 or more.
    """
    return (factor * images).clamp(max=1)


def add_noise(images: Tensor, std: float) -> Tensor:
    """Add Gaussian noise to every pixel, from torch's global generator.

    Args:
        images: Images [N, C, H, W] in [0, 1].
        std: The standard deviation of the noise.
    """
    return images + std * torch.randn_like(images)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Blur images with a Gaussian kernel, truncated at three sigma or the image size.

    Args:
        images: Images [N, C, H, W].
        sigma: The standard deviation of the kernel, in pixels.
    """
    from torchvision.transforms.v2.functional import gaussian_blur

    reach = min(math.ceil(3 * sigma), *(size - 1 for size in images.shape[-2:]))
    return gaussian_blur(images, [2 * reach + 1] * 2, [sigma] * 2)


# The first three are those of Ferianc et al. (2021).
DISTORTIONS: dict[str, Distortion] = {
    "rotation": Distortion(rotate, (15, 30, 45, 60, 75)),
    "shift": Distortion(shift, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "brightness": Distortion(brighten, (1.5, 2, 2.5, 3, 3.5), nothing=1.0),
    "noise": Distortion(add_noise, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "blur": Distortion(blur, (0.5, 1, 1.5, 2, 2.5)),
}
