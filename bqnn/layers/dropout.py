"""Monte-Carlo dropout: dropout that stays active in evaluation mode."""

from torch import Tensor, nn

from bqnn.arguments import real_number
from bqnn.layers.draws import Stochastic, evaluation_coins
from bqnn.layers.markers import DropoutSite
from bqnn.layers.noise import coins_like
from bqnn.layers.swap import check_plain


class MCDropout(Stochastic):
    """Dropout in training and evaluation mode (Gal & Ghahramani 2016).

    Each row has its own mask. Inputs [B, C, H, W] lose whole channels, other inputs [B, ..., F]
    lose features. The remaining values are scaled by 1 / (1 - rate). Because dropout is active in
    evaluation mode, batch norm can stay in evaluation mode for predictions.

    Args:
        rate: Probability that a value is dropped, in [0, 1).

    Example:
        >>> import torch
        >>> out = MCDropout(0.5).eval()(torch.ones(2, 100))
        >>> out.unique()
        tensor([0., 2.])
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        reason = "the share of dropped values must be at least 0 and less than 1"
        self.rate = real_number("rate", rate, reason, 0, 1, without=(1,))

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0:
            return x
        return x * self.kept(x).to(x.dtype).mul_(1 / (1 - self.rate))

    def kept(self, x: Tensor) -> Tensor:
        """Draw the kept channels or features of each row: bool, [B, C, 1, 1] or [B, ..., F]."""
        first = x[..., 0, 0] if x.dim() == 4 else x
        # The dropped values are drawn, not the kept ones: 1 - rate would lose a tiny rate.
        dropped = (coins_like if self.training else evaluation_coins)(first, self.rate)
        return dropped.logical_not_().view(dropped.shape + (1,) * (x.dim() - first.dim()))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def to_mcdropout(net: nn.Module, rate: float, before_output: bool = True) -> nn.Module:
    """Replace the dropout sites of a network by MC dropout, in place.

    Args:
        net: The network. It stays unchanged when an error is raised.
        rate: Probability that a value is dropped, in [0, 1).
        before_output: Whether to convert the site before the output layer, too.

    Returns:
        The network.

    Raises:
        ValueError: The network has no site to convert, or the rate is out of range.
        TypeError: A conversion would lose a part of a site, such as a hook.

    Example:
        >>> to_mcdropout(nn.Sequential(DropoutSite(), nn.Linear(3, 2)), rate=0.1)
        Sequential(
          (0): MCDropout(rate=0.1)
          (1): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    sites = []
    for path, parent in net.named_modules():
        for name, child in parent._modules.items():
            if isinstance(child, DropoutSite) and (before_output or not child.before_output):
                check_plain(f"{path}.{name}".lstrip("."), child)
                sites.append((parent, name, MCDropout(rate).train(child.training)))
    if not sites:
        raise ValueError("to_mcdropout: the network has no DropoutSite to convert")
    for parent, name, dropout in sites:
        setattr(parent, name, dropout)
    return net
