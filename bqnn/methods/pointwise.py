"""Pointwise: one value per weight, as a baseline."""

from bqnn.methods.base import Method


class Pointwise(Method):
    """Maximum likelihood, or maximum a posteriori with weight decay. All draws are equal.

    Examples:
        >>> import torch
        >>> from bqnn.inference.likelihoods import Regression
        >>> from bqnn.nets import MLP
        >>> net, likelihood = MLP([3], [1, 1], hidden_features=[4]), Regression(0.0, 1.0)
        >>> options = {"num_train": 100, "seed": 0, "optimizer": {"name": "adam"}}
        >>> method = Pointwise(net, likelihood, **options)
        >>> method.eval().predictive(torch.zeros(2, 3)).shape
        torch.Size([1, 2, 2])
    """

    @property
    def available_samples(self) -> int:
        return 1  # all draws would be equal

    def check_samples(self, num_samples: int | None) -> int:
        return self.available_samples
