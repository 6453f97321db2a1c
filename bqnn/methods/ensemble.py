"""Deep ensemble: networks that are trained independently of each other."""

from collections.abc import Callable
from typing import Any

from torch import nn

from bqnn.arguments import whole_number
from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.ensemble import Ensemble
from bqnn.methods.members import MemberTraining


class DeepEnsemble(MemberTraining):
    """Deep ensemble (Lakshminarayanan et al., 2017): networks with different initial weights.

    All members are trained at once, each by its own loss, as `Pointwise` would train it. They see
    the same batches.

    Args:
        net: The network of member 0.
        num_members: The number of members.
        make_net: Makes the network of a member, from its number. The networks differ in their
            initial weights only.
        options: Arguments of `Method`.

    Examples:
        >>> import torch
        >>> from bqnn.inference.likelihoods import Regression
        >>> from bqnn.nets import MLP
        >>> def make_net(member):
        ...     torch.manual_seed(member)
        ...     return MLP([3], [1, 1], hidden_features=[4])
        >>> options = {"num_train": 100, "seed": 0, "optimizer": {"name": "adam"}}
        >>> options |= {"num_members": 5, "make_net": make_net}
        >>> method = DeepEnsemble(make_net(0), Regression(0.0, 1.0), **options)
        >>> method.eval().predictive(torch.zeros(2, 3)).shape
        torch.Size([5, 2, 2])
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        *,
        num_members: int,
        make_net: Callable[[int], nn.Module],
        **options: Any,
    ) -> None:
        reason = "an ensemble has at least one member"
        num_members = whole_number("num_members", num_members, reason, 1)
        nets = [net, *map(make_net, range(1, num_members))]
        super().__init__(Ensemble.of(nets), likelihood, **options)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.net.follow()
