"""MC dropout: dropout stays active, and each forward pass is a draw from the posterior."""

from typing import Any

from torch import nn

from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.dropout import to_mcdropout
from bqnn.methods.base import Method


class MCDropoutMethod(Method):
    """MC dropout (Gal & Ghahramani, 2016), with one rate for all sites of the network.

    Args:
        net: The network. Its `DropoutSite`s become dropout layers.
        rate: The dropout probability.
        drop_before_output: Whether the site before the output layer drops values, too.
        options: Arguments of `Method`.

    Example:
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
        rate: float,
        drop_before_output: bool,
        **options: Any,
    ) -> None:
        super().__init__(to_mcdropout(net, rate, drop_before_output), likelihood, **options)
