"""A pytest plugin: torch without operators on quantized tensors, as upstream means it to be."""

from typing import Any, NoReturn

import torch

FUNCTIONS = (
    "quantize_per_tensor",
    "quantize_per_tensor_dynamic",
    "quantize_per_channel",
    "_make_per_tensor_quantized_tensor",
    "_make_per_channel_quantized_tensor",
    "_empty_affine_quantized",
    "_empty_per_channel_affine_quantized",
)


class Gone:
    """In the place of torch.ops.quantized."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"torch.ops.quantized.{name} is gone")


def _raise(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("a quantized tensor was made")


def remove() -> None:
    """Replace what makes and reads quantized tensors by what raises."""
    setattr(torch.ops, "quantized", Gone())  # noqa: B010 (torch.ops declares no attributes)
    for name in FUNCTIONS:
        if not hasattr(torch, name):
            raise AttributeError(f"this version of torch has no torch.{name}")
        setattr(torch, name, _raise)


remove()
