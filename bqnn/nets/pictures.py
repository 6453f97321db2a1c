"""Checks of the input shape of image networks."""

from collections.abc import Sequence


def image_shape(input_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """Return channels, height and width. ValueError: not an image of at least this size."""
    if len(input_shape) != 3:
        raise ValueError(
            f"inputs of shape {tuple(input_shape)} are not pictures (channels, height, width); "
            "use net=mlp"
        )
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise ValueError(
            f"pictures of {height}x{width} are too small for this network; it takes at least "
            f"{smallest}x{smallest}, net=mlp takes any size"
        )
    return channels, height, width
