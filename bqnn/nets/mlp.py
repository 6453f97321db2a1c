"""The multi-layer perceptron for tables."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from bqnn.arguments import ArgumentError
from bqnn.layers.markers import DropoutSite, Enter
from bqnn.nets.heads import Heads


class MLP(nn.Sequential):
    """Multi-layer perceptron with ReLU: [B, ...] -> [B, sum(heads)].

    The default hidden layers, with two heads, are the regression network of Ferianc et al. (2021).

    Args:
        input_shape: Shape of a row; inputs are flattened.
        heads: The number of outputs of each head.
        hidden_features: The sizes of the hidden layers.

    Raises:
        ValueError: There is no hidden layer.

    Examples:
        >>> import torch
        >>> net = MLP([13], heads=[1, 1])
        >>> net(torch.zeros(4, 13)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        heads: Sequence[int],
        *,
        hidden_features: Sequence[int] = (100, 100, 100),
    ) -> None:
        if not hidden_features:
            raise ArgumentError(
                "hidden_features=[]: an MLP needs a hidden layer; give at least one size",
                "hidden_features",
            )
        in_features = 1
        for size in input_shape:
            in_features *= size
        layers: list[nn.Module] = [nn.Flatten(), Enter()]
        for index, width in enumerate(hidden_features):
            if index > 0:
                layers.append(DropoutSite())
            layers += [nn.Linear(in_features, width), nn.ReLU()]
            in_features = width
        features = nn.Sequential(*layers)
        site = DropoutSite(before_output=True)
        output = Heads(in_features, heads, bias=True)
        super().__init__(OrderedDict(features=features, site=site, output=output))
