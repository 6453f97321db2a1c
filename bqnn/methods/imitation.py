"""Imitation: trained networks predict the targets of a fine-tuning."""

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn

from bqnn.layers.draws import Stochastic
from bqnn.layers.noise import repeated_noise


class Imitation:
    """Copies of trained networks, which predict what the networks shall learn to predict again.

    A draw of a network learns from the draw of its copy with the same noise and the same dropout
    masks. So the draws keep their differences, which are the uncertainty about the weights. Targets
    would make them alike, since all draws learn the same ones.

    Args:
        networks: The networks, which are copied.

    Attributes:
        networks: The copies. They predict with the noise of a training and the batch norm of an
            evaluation.

    Examples:
        >>> from bqnn.layers.dropout import MCDropout
        >>> net = nn.Sequential(MCDropout(0.5), nn.Linear(10, 1))
        >>> imitation, x = Imitation([net]), torch.ones(4, 10)
        >>> predicted = imitation.predict(0, x)
        >>> torch.equal(net(x), predicted)  # the same masks
        True
        >>> torch.equal(net(x), predicted)
        False
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self.networks = [deepcopy(net).eval().requires_grad_(False) for net in networks]
        for net in self.networks:
            for module in net.modules():
                if isinstance(module, Stochastic):
                    module.train()
        self.is_used = False  # whether a loss has asked for a prediction

    def to(self, device: torch.device) -> None:
        """Move the copies to a device."""
        for net in self.networks:
            net.to(device)

    @torch.no_grad()
    def predict(self, number: int, inputs: Tensor) -> Tensor:
        """Predict with copy `number`; the next forward pass in training draws the same noise.

        Args:
            number: The place of the network in `networks`.
            inputs: Inputs [B, ...].
        """
        self.is_used = True
        with repeated_noise(inputs.device):
            out: Tensor = self.networks[number](inputs)
        return out
