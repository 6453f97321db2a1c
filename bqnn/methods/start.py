"""Base class of methods that can start from a trained pointwise network."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bqnn.arguments import ArgumentError
from bqnn.layers.bayes import GaussianWeight
from bqnn.methods.base import Method


class PointwiseStart(Method):
    """Base class for methods with Gaussian weights that can start from a pointwise network.

    Attributes:
        trains_after_start: Whether a network that `initialize_from` has set is trained further. If
            not, its training is one epoch, in which it stays as it is.
    """

    trains_after_start: bool = True

    @torch.no_grad()
    def initialize_from(self, state: Mapping[str, Tensor]) -> None:
        """Initialize from a pointwise method with the same network.

        Its weights become the means. Other parameters and buffers are copied.

        Args:
            state: The `state_dict` of the pointwise method.

        Raises:
            ValueError: The state does not fit this network.
        """
        given: dict[str, Tensor | None] = dict(state)
        for name, layer in self.named_modules():
            if isinstance(layer, GaussianWeight):
                given[f"{name}.mean"] = given.pop(f"{name}.weight", None)
                given[f"{name}.rho"] = layer.rho
        own = self.state_dict()
        differing = [
            name for name in own.keys() | given.keys() if _shape(given, name) != _shape(own, name)
        ]
        if differing:
            raise ArgumentError(
                "state: its network is not this one, they differ in "
                f"{', '.join(sorted(differing)[:3])}; train with the same net and task",
                "state",
            )
        self.load_state_dict(given)


def _shape(state: Mapping[str, Tensor | None], name: str) -> torch.Size | None:
    value = state.get(name)
    return None if value is None else value.shape
