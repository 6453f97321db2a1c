"""Check of the input shape of image networks."""

from collections.abc import Sequence


def image_shape(input_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """Check the input shape of an image network.

    Args:
        input_shape: Channels, height and width.
        smallest: The smallest height and width that the network supports, in pixels.

    Returns:
        Channels, height and width.

    Raises:
        ValueError: The shape is not that of an image, or the image is too small.

    Examples:
        >>> image_shape([3, 32, 32], smallest=8)
        (3, 32, 32)
    """
    if len(input_shape) != 3:
        raise ValueError(
            f"inputs of shape {tuple(input_shape)} are not images (channels, height, width); "
            "use net=mlp"
        )
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise ValueError(
            f"images of {height}x{width} are too small for this network, which needs at least "
            f"{smallest}x{smallest}; use net=mlp, which supports any size"
        )
    return channels, height, width
