"""A network, a method and a data set in a package of their own."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.data import Rows, TensorData
from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.dropout import to_mcdropout
from bqnn.layers.markers import DropoutSite, Enter
from bqnn.methods import Method
from bqnn.methods.terms import Terms
from bqnn.nets.heads import Heads


class Strips(nn.Module):
    """A perceptron with one hidden layer: [B, ...] -> [B, sum(heads)].

    Args:
        input_shape: Shape of a row; inputs are flattened.
        heads: The number of outputs of each head.
        width: The size of the hidden layer.
    """

    def __init__(
        self, input_shape: Sequence[int], heads: Sequence[int], *, width: int = 16
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Flatten(), Enter(), nn.Linear(math.prod(input_shape), width), nn.ReLU()
        )
        self.site = DropoutSite(before_output=True)
        self.output = Heads(width, heads, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.site(self.features(x)))
        return out


class NoisyDropout(Method):
    """MC dropout that is trained on inputs with Gaussian noise.

    Args:
        net: The network.
        likelihood: The likelihood of the network's outputs.
        noise: Standard deviation of the noise.
        rate: The share of values that are dropped.
        options: Arguments of `Method`.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        *,
        noise: float = 0.1,
        rate: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(to_mcdropout(net, rate), likelihood, **options)
        self.noise = noise

    def loss_terms(self, inputs: Tensor, targets: Tensor) -> Terms:
        return super().loss_terms(inputs + self.noise * torch.randn_like(inputs), targets)


class TwoMoons(TensorData):
    """Two half circles with noise, one per class: inputs [2].

    Args:
        num_rows: The number of rows; every fourth is a test row.
        spread: Standard deviation of the noise.
        options: Arguments of `TensorData`.
    """

    def __init__(self, *, num_rows: int = 400, spread: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.num_rows = num_rows
        self.spread = spread

    def facts(self) -> dict[str, object]:
        return {
            "likelihood": "classification",
            "class_names": ["upper", "lower"],
            "input_shape": [2],
            "num_train": len(self.train),
        }

    def _read(self) -> tuple[Rows, Rows]:
        generator = torch.Generator().manual_seed(0)
        targets = torch.arange(self.num_rows) % 2
        angle = math.pi * torch.rand(self.num_rows, generator=generator)
        upper = torch.stack([angle.cos(), angle.sin()], dim=1)
        lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
        inputs = torch.where(targets.unsqueeze(1) == 0, upper, lower)
        inputs += self.spread * torch.randn(inputs.shape, generator=generator)
        rows, is_test = Rows(inputs, targets), torch.arange(self.num_rows) // 2 % 4 == 0
        return rows.take(~is_test), rows.take(is_test)
