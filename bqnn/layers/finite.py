"""Check that inputs are finite. int8 would silently turn a NaN into a number."""

from torch import Tensor


def refuse_non_finite(x: Tensor, which: str = "inputs") -> None:
    """Raise an error if inputs contain NaN or infinity.

    Args:
        x: Inputs [B, ...]; integers always pass.
        which: The name of the inputs, for the error message.

    Raises:
        ValueError: A value is not finite. The message names the first such row.

    Examples:
        >>> import torch
        >>> x = torch.tensor([[0.0], [torch.inf]])
        >>> refuse_non_finite(x)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: 1 of the 2 rows of inputs contain NaN or infinity, first row 1 ...
    """
    # The sum is fast, and not finite if a value is not.
    if not x.is_floating_point() or bool(x.sum().isfinite()) or bool(x.isfinite().all()):
        return
    bad = (~x.isfinite()).reshape(len(x), -1).any(1).nonzero()
    raise ValueError(
        f"{len(bad)} of the {len(x)} rows of {which} contain NaN or infinity, first row "
        f"{int(bad[0])} (counted from 0); remove these rows, or fill their gaps"
    )
