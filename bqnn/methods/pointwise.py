"""Pointwise: one value per weight, the baseline."""

from bqnn.methods.base import Method


class Pointwise(Method):
    """Maximum likelihood, or a posteriori with weight decay."""

    @property
    def available_samples(self) -> int:
        return 1  # all draws would be equal

    def check_samples(self, num_samples: int | None) -> int:
        return self.available_samples
