"""Monte-Carlo dropout: dropout that stays active in evaluation mode."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bqnn.arguments import ArgumentError, real_number
from bqnn.layers.draws import Stochastic, evaluation_coins
from bqnn.layers.markers import DropoutSite
from bqnn.layers.noise import coins_like
from bqnn.layers.swap import check_float, check_plain
from bqnn.layers.trace import caller_of, function_of, trace
from bqnn.text import type_of

# The dropout layers of torch, with the number of last dimensions that are dropped together.
DROPOUTS: Mapping[type[nn.Module], int] = {
    nn.Dropout: 0,
    nn.Dropout1d: 1,
    nn.Dropout2d: 2,
    nn.Dropout3d: 3,
}
LAYERS = (*DROPOUTS, nn.AlphaDropout, nn.FeatureAlphaDropout)
FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


class MCDropout(Stochastic):
    """Dropout in training and evaluation mode (Gal & Ghahramani 2016).

    Each row has its own mask. By default, inputs [B, C, H, W] lose whole channels, and other inputs
    [B, ..., F] lose features. The remaining values are scaled by 1 / (1 - rate). Because dropout is
    active in evaluation mode, batch norm can stay in evaluation mode for predictions.

    Args:
        rate: Probability that a value is dropped, in [0, 1).
        dims: The number of last dimensions that are dropped together: 0 as in nn.Dropout, 2 as in
            nn.Dropout2d. None is 2 for inputs with 4 dimensions, and 0 for others.

    Examples:
        >>> import torch
        >>> out = MCDropout(0.5).eval()(torch.ones(2, 100))
        >>> out.unique()
        tensor([0., 2.])
    """

    one_for_all = False  # whether all rows of a batch have one mask, as in an exported file
    given: Iterator[Tensor] | None = None  # masks to use instead of drawing, see `given_masks`

    def __init__(self, rate: float, dims: int | None = None) -> None:
        super().__init__()
        reason = "the share of dropped values must be at least 0 and less than 1"
        self.rate = real_number("rate", rate, reason, 0, 1, without=(1,))
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0:
            return x
        return x * self.kept(x).to(x.dtype).mul_(1 / (1 - self.rate))

    def kept(self, x: Tensor) -> Tensor:
        """Draw what is kept of each row: booleans that broadcast over `x`."""
        if self.given is not None:
            return next(self.given)
        first = self._one_of_each(x)
        # The dropped values are drawn, not the kept ones: 1 - rate would lose a tiny rate.
        dropped = (coins_like if self.training else evaluation_coins)(first, self.rate)
        return dropped.logical_not_().view(dropped.shape + (1,) * (x.dim() - dropped.dim()))

    def kept_like(self, x: Tensor) -> Tensor:
        """Return booleans shaped like those of `kept`, all of them True, without drawing."""
        first = self._one_of_each(x)
        return first.new_ones(first.shape + (1,) * (x.dim() - first.dim()), dtype=torch.bool)

    def _one_of_each(self, x: Tensor) -> Tensor:
        """Return one element of those that are dropped together."""
        dims = (2 if x.dim() == 4 else 0) if self.dims is None else self.dims
        first = x[:1] if self.one_for_all else x
        for _ in range(dims):
            first = first[..., 0]
        return first

    def extra_repr(self) -> str:
        return f"rate={self.rate}" + ("" if self.dims is None else f", dims={self.dims}")


@contextmanager
def one_mask_for_all_rows(net: nn.Module) -> Iterator[None]:
    """Give all rows of a batch one mask in each draw: that of its first row.

    Args:
        net: A network. Its masks are per row again after the context.
    """
    dropouts = [module for module in net.modules() if isinstance(module, MCDropout)]
    for dropout in dropouts:
        dropout.one_for_all = True
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.one_for_all = False


@contextmanager
def given_masks(net: nn.Module, masks: Iterable[Tensor]) -> Iterator[None]:
    """Let MC dropout use given masks instead of drawing its own.

    Args:
        net: A network. It draws masks again after the context.
        masks: What is kept, as `MCDropout.kept` returns it, in the order of its calls.

    Examples:
        >>> import torch
        >>> dropout = MCDropout(0.5).eval()
        >>> with given_masks(dropout, [torch.tensor([[True, False]])]):
        ...     dropout(torch.ones(1, 2))
        tensor([[2., 0.]])
    """
    dropouts = [module for module in net.modules() if isinstance(module, MCDropout)]
    given = iter(masks)
    for dropout in dropouts:
        dropout.given = given
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.given = None


def to_mcdropout(
    net: nn.Module, rate: float | None = None, before_output: bool = True
) -> nn.Module:
    """Replace the dropout of a network by MC dropout, in place.

    Args:
        net: The network, with dropout layers of torch or with a `DropoutSite` where values may be
            dropped. It stays unchanged when an error is raised.
        rate: Probability that a value is dropped, in [0, 1), at every place. None keeps the rates
            of the dropout layers.
        before_output: Whether to convert a `DropoutSite` before the output layer, too.

    Returns:
        The network.

    Raises:
        ValueError: The network has nothing to convert, the rate is out of range, or a `DropoutSite`
            needs a rate.
        TypeError: A conversion would lose a part of a layer, such as a hook; the network has
            alpha dropout, or drops values by calls of functions.

    Examples:
        >>> to_mcdropout(nn.Sequential(nn.Dropout(0.1), nn.Linear(3, 2)))
        Sequential(
          (0): MCDropout(rate=0.1, dims=0)
          (1): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    check_float(net, "to_mcdropout")
    made: dict[nn.Module, MCDropout] = {}
    places = []
    for place, child in net.named_modules(remove_duplicate=False):
        is_site = isinstance(child, DropoutSite) and (before_output or not child.before_output)
        if place and (is_site or isinstance(child, LAYERS)):
            check_plain(place, child)
            if child not in made:  # a layer that is used twice stays one
                made[child] = _mcdropout(place, child, rate).train(child.training)
            places.append((place, made[child]))
    _refuse_hidden(net)
    if not places:
        raise ValueError(
            "to_mcdropout: the network has no DropoutSite or nn.Dropout to convert; put nn.Dropout "
            "before each linear layer or convolution but the first"
        )
    for place, dropout in places:
        net.set_submodule(place, dropout)
    return net


def _mcdropout(place: str, module: nn.Module, rate: float | None) -> MCDropout:
    """Return the MC dropout for a dropout layer or a site."""
    if isinstance(module, DropoutSite):
        if rate is None:
            raise ArgumentError(
                f"rate=None: {place} is a DropoutSite, which has no rate; give a rate, such as 0.1",
                "rate",
            )
        return MCDropout(rate)
    dims = DROPOUTS.get(type(module))
    if dims is None:
        raise TypeError(
            f"to_mcdropout: {place} is {type_of(module)}, which MC dropout does not "
            f"support; use {', '.join(kind.__name__ for kind in DROPOUTS)}"
        )
    own: float = module.p  # type: ignore[assignment]
    return MCDropout(own if rate is None else rate, dims)


def _refuse_hidden(net: nn.Module) -> None:
    """Raise a TypeError for dropout that is not a module, as far as a trace shows it."""
    for name, module in net.named_modules():
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0:
            raise TypeError(
                f"to_mcdropout: {name or 'the network'} is {type_of(module)} with dropout="
                f"{module.dropout}, which stays off in predictions; create it with dropout=0"
            )
    try:
        graph = trace(net, training=True)
    except TypeError:
        return
    for node in graph.nodes:
        if function_of(node) in FUNCTIONS:
            raise TypeError(
                f"to_mcdropout: {node.target.__name__}, called by "
                f"{caller_of(node) or 'the network itself'}, cannot be replaced; "
                "use a module such as nn.Dropout"
            )
