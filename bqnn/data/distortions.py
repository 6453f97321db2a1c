"""Distorted images, at five levels each.

Rotation, shift, brightness, noise and blur are the distortions of a suite by default. The others
are corruptions after Hendrycks & Dietterich (2019) that images of any size can have. Their images
are not those of CIFAR-10-C or MNIST-C, which other code has made with other amounts.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
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

    Random distortions start from the same random numbers at every level and in every call.

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


def add_shot_noise(images: Tensor, std: float) -> Tensor:
    """Replace every pixel by a scaled Poisson number with its mean, as if it counted photons.

    Args:
        images: Images [N, C, H, W] in [0, 1].
        std: The standard deviation of a white pixel, above 0; it falls with the square root of the
            brightness.
    """
    return torch.poisson(images / std**2) * std**2


def add_impulse_noise(images: Tensor, share: float) -> Tensor:
    """Make a share of the values black or white, half each, from torch's global generator.

    Args:
        images: Images [N, C, H, W] in [0, 1].
        share: The share of all values, from 0 to 1.
    """
    chance = torch.rand_like(images)
    images = torch.where(chance < share / 2, torch.zeros_like(images), images)
    return torch.where(chance > 1 - share / 2, torch.ones_like(images), images)


def reduce_contrast(images: Tensor, factor: float) -> Tensor:
    """Multiply the difference of each pixel from the mean of its image and channel by a factor.

    Args:
        images: Images [N, C, H, W].
        factor: The factor, from 0 to 1.

    Examples:
        >>> reduce_contrast(torch.tensor([[[[0.0, 1.0]]]]), factor=0.5)
        tensor([[[[0.2500, 0.7500]]]])
    """
    mean = images.mean((2, 3), keepdim=True)
    return mean + factor * (images - mean)


def pixelate(images: Tensor, share: float) -> Tensor:
    """Reduce the resolution of images by averages, and enlarge them again by repeated pixels.

    Args:
        images: Images [N, C, H, W].
        share: The lower resolution as a share of the height and width, rounded to whole pixels.

    Examples:
        >>> pixelate(torch.tensor([[[[0.0, 1.0, 2.0, 3.0]]]]), share=0.5)
        tensor([[[[0.5000, 0.5000, 2.5000, 2.5000]]]])
    """
    height, width = images.shape[-2:]
    smaller = (max(1, round(share * height)), max(1, round(share * width)))
    return F.interpolate(F.interpolate(images, smaller, mode="area"), (height, width))


def compress(images: Tensor, quality: float) -> Tensor:
    """Compress images as JPEG, and decompress them.

    Args:
        images: Images [N, C, H, W] in [0, 1]. Three channels are red, green and blue, others are
            compressed one by one.
        quality: The quality of JPEG, from 1 to 95.
    """
    planes = images if images.shape[1] == 3 else images.flatten(0, 1)
    values = planes.mul(255).round().byte().numpy()
    pictures = values.transpose(0, 2, 3, 1) if values.ndim == 4 else values
    compressed = np.stack([_through_jpeg(picture, int(quality)) for picture in pictures])
    restored = torch.from_numpy(compressed).float() / 255
    return restored.movedim(-1, 1) if values.ndim == 4 else restored.view_as(images)


def _through_jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))


# The first three are those of Ferianc et al. (2021).
DISTORTIONS: dict[str, Distortion] = {
    "rotation": Distortion(rotate, (15, 30, 45, 60, 75)),
    "shift": Distortion(shift, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "brightness": Distortion(brighten, (1.5, 2, 2.5, 3, 3.5), nothing=1.0),
    "noise": Distortion(add_noise, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "blur": Distortion(blur, (0.5, 1, 1.5, 2, 2.5)),
    "shot_noise": Distortion(add_shot_noise, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "impulse_noise": Distortion(add_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "contrast": Distortion(reduce_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), nothing=1.0),
    "pixelation": Distortion(pixelate, (0.8, 0.65, 0.5, 0.4, 0.3), nothing=1.0),
    "jpeg": Distortion(compress, (25, 18, 15, 10, 7), nothing=100.0),
}
