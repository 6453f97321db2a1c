"""MC dropout: dropout stays on, and each pass is a draw from the posterior."""

from typing import Any

from torch import nn

from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.dropout import to_mcdropout
from bqnn.methods.base import Method


class MCDropoutMethod(Method):
    """Gal & Ghahramani (2016), with one rate for all sites of the network.

    `drop_before_output` says whether the site before the output layer drops too.
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
