"""MC dropout: dropout stays on, and each pass is a draw from the posterior."""

from typing import Any

from torch import nn

from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.dropout import to_mcdropout
from bqnn.methods.base import Method


class MCDropoutMethod(Method):
    """Gal & Ghahramani (2016): dropout stays on for predictions.

    Args:
        net: The network, with dropout layers of torch, or a `DropoutSite` where values may be
            dropped.
        rate: The share of values that is dropped, at every place. None keeps the rates of the
            dropout layers.
        drop_before_output: Whether a `DropoutSite` before the output layer drops, too.
        options: For `Method`.

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
        rate: float | None,
        drop_before_output: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(to_mcdropout(net, rate, drop_before_output), likelihood, **options)
