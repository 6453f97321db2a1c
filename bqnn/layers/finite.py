"""Refuse inputs that are not finite: int8 would turn a NaN into a number unnoticed."""

from torch import Tensor


def refuse_non_finite(x: Tensor, which: str = "inputs") -> None:
    """Raise a ValueError if rows of x, [B, ...], hold NaN or infinity."""
    if not x.is_floating_point() or bool(x.isfinite().all()):
        return
    bad = (~x.isfinite()).reshape(len(x), -1).any(1).nonzero()
    raise ValueError(
        f"{len(bad)} of the {len(x)} rows of {which} hold NaN or infinity, row {int(bad[0])} is "
        "the first (counted from 0); leave them out, or fill their gaps"
    )
