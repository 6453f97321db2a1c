"""Monte-Carlo dropout: dropout that is also active in evaluation."""

from torch import Tensor, nn

from bqnn.arguments import real_number
from bqnn.layers.draws import Stochastic, evaluation_coins
from bqnn.layers.markers import DropoutSite
from bqnn.layers.noise import coins_like
from bqnn.layers.swap import check_plain


class MCDropout(Stochastic):
    """Dropout of whole channels of [B, C, H, W], or of features of [B, ..., F], in every mode.

    Each row has a mask of its own; what is kept is scaled by 1 / (1 - rate) (Gal &
    Ghahramani, 2016). It drops in eval mode too, so that evaluation never has to leave it, which
    would disturb batch norm.
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
        # Coins say what is dropped: a tiny rate would be lost in 1 - rate.
        dropped = (coins_like if self.training else evaluation_coins)(first, self.rate)
        return dropped.logical_not_().view(dropped.shape + (1,) * (x.dim() - first.dim()))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def to_mcdropout(net: nn.Module, rate: float, before_output: bool = True) -> nn.Module:
    """Replace the dropout sites of a network by MC dropout, in place.

    `before_output` says whether the site before the output layer drops too. ValueError: there is no
    site; TypeError: a site has something, such as hooks, that would be lost.
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
