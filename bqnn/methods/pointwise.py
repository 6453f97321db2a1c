"""Pointwise: one value per weight, the baseline."""

from typing import Any

from bqnn.methods.base import Method


class Pointwise(Method):
    """Maximum likelihood, or a posteriori with weight decay; one draw is all there is."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.num_samples != 1:
            raise ValueError(
                f"method.num_samples={self.num_samples}: a pointwise network has one output; "
                "leave it at 1"
            )
