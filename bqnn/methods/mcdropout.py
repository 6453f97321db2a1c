"""MC dropout: dropout stays active, and each forward pass is a draw from the posterior."""

from typing import Any

from torch import nn

from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.dropout import to_mcdropout
from bqnn.methods.base import Method


class MCDropoutMethod(Method):
    """MC dropout (Gal & Ghahramani, 2016): dropout stays active in predictions.

    Args:
        net: The network, with dropout layers of torch, or with a `DropoutSite` wherever values may
            be dropped.
        rate: The dropout probability at every place; None keeps the rates of the dropout layers.
        drop_before_output: Whether a `DropoutSite` before the output layer drops values, too.
        options: Arguments of `Method`.

    Examples:
        >>> import torch
        >>> from bqnn.inference.likelihoods import Regression
        >>> from bqnn.nets import MLP
        >>> net, likelihood = MLP([3], [1, 1], hidden_features=[4]), Regression(0.0, 1.0)
        >>> options = {"num_train": 100, "seed": 0, "optimizer": {"name": "adam"}}
        >>> method = MCDropoutMethod(net, likelihood, rate=0.1, drop_before_output=True, **options)
        >>> method.eval().predictive(torch.zeros(2, 3)).shape
        torch.Size([20, 2, 2])
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        *,
        rate: float | None,
        drop_before_output: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(to_mcdropout(net, rate, drop_before_output), likelihood, **options)
