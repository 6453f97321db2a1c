"""Draws of random modules. A draw belongs to a call, not to the modules."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.layers.noise import coins_like, cpu_noise_like


class Draw:
    """One held draw of a network.

    Args:
        generator: CPU generator of the random numbers.
        values: The results of `Drawn.make_draw` by module.

    Attributes:
        rows: The rows of the batch that are computed and the size of the batch, see `held_rows`.
    """

    def __init__(self, generator: torch.Generator, values: Mapping[nn.Module, Any]) -> None:
        self.generator = generator
        self.values = dict(values)
        self.common: dict[int, Tensor] = {}  # the noise that layers share, by its length
        self.rows: tuple[Tensor, int] | None = None

    def of_rows(self, like: Tensor, sample: Callable[[Tensor], Tensor]) -> Tensor:
        """Sample random numbers like a tensor, for the rows of the batch that are computed.

        Args:
            like: A tensor with the shape of the result.
            sample: Samples random numbers in the shape of its argument.
        """
        if self.rows is None:
            return sample(like)
        rows, size = self.rows
        if len(like) != len(rows):
            raise ValueError(
                f"early stop: a random module reads {len(like)} rows where the batch has "
                f"{len(rows)}, so its random numbers belong to no row; predict without tolerance"
            )
        return sample(like[:1].expand(size, *like.shape[1:]))[rows.to(like.device)]


# One value per thread (and asyncio task), so that threads can share a network.
_held: ContextVar[Draw | None] = ContextVar("held draw", default=None)


class Stochastic(nn.Module):
    """Base class for modules whose output is random in evaluation mode.

    They take their random numbers from `evaluation_noise` and `evaluation_coins`, which use the
    generator of the held draw.
    """


class Drawn(Stochastic):
    """Base class for modules that represent a distribution over functions.

    By default, each call makes a new draw. While a draw is held, all calls use it. Subclasses
    implement `make_draw`.
    """

    def make_draw(self, index: int) -> Any:
        """Return draw number `index`, in the form that `forward` needs; never None."""
        raise NotImplementedError

    def held(self) -> Any:
        """Return this module's part of the draw that the thread holds, or None."""
        draw = _held.get()
        return None if draw is None else draw.values.get(self)


class DrawnWeights(Drawn):
    """Base class for layers with random weights. Subclasses implement `draw`."""

    def draw(self) -> Any:
        """Draw the weights, in the form that `forward` needs."""
        raise NotImplementedError

    def held_weights(self) -> Any:
        """Return the weights that the thread holds, or None."""
        # torch.export would turn a held draw into a constant.
        return None if torch.compiler.is_exporting() else self.held()

    def weights(self) -> Any:
        """Return the held draw of the weights, or a new draw."""
        held = self.held_weights()
        return self.draw() if held is None else held

    def make_draw(self, index: int) -> Any:
        return self.draw()


@contextmanager
def held_draw(
    net: nn.Module,
    index: int,
    generator: torch.Generator | None = None,
    made: Mapping[nn.Module, Any] | None = None,
) -> Iterator[None]:
    """Hold one draw of every random module of a network, in this thread.

    Args:
        net: The network. Held draws of other networks stay held.
        index: The number of the draw. It selects the member of an ensemble.
        generator: CPU generator for all random numbers of the draw. The default is torch's global
            generator.
        made: The result of `make_draw` for the network, which is then not made again. Random
            numbers of calls, such as dropout masks, still come from the generator.

    Examples:
        >>> from bqnn.layers.bayes import to_bayes
        >>> net = to_bayes(nn.Sequential(nn.Linear(3, 2)), prior_std=1.0, init_rho=0.0).eval()
        >>> x = torch.ones(1, 3)
        >>> with held_draw(net, 0):
        ...     torch.equal(net(x), net(x))
        True
        >>> torch.equal(net(x), net(x))
        False
    """
    outer = _held.get()
    draw = Draw(
        torch.default_generator if generator is None else generator,
        {} if outer is None else outer.values,
    )
    token = _held.set(draw)
    try:
        if made is None:
            for module in net.modules():
                if isinstance(module, Drawn):
                    draw.values[module] = module.make_draw(index)
        else:
            draw.values.update(made)
        yield
    finally:
        _held.reset(token)


@contextmanager
def held_rows(rows: Tensor | None, size: int) -> Iterator[None]:
    """Let modules draw random numbers for a whole batch, of which only some rows are computed.

    The rows then get the random numbers that they would get with all rows of the batch.

    Args:
        rows: The indices of the rows; None for all rows of the batch.
        size: The number of rows of the batch.

    Examples:
        >>> from bqnn.layers.dropout import MCDropout
        >>> dropout, x = MCDropout(0.5).eval(), torch.ones(4, 3)
        >>> def output(rows):
        ...     generator = torch.Generator().manual_seed(0)
        ...     with held_draw(dropout, 0, generator), held_rows(rows, len(x)):
        ...         return dropout(x if rows is None else x[rows])
        >>> rows = torch.tensor([1, 3])
        >>> torch.equal(output(rows), output(None)[rows])
        True
    """
    draw = _held.get()
    if draw is None or rows is None:
        yield
        return
    draw.rows = (rows, size)
    try:
        yield
    finally:
        draw.rows = None


def make_draw(net: nn.Module, index: int, generator: torch.Generator) -> dict[nn.Module, Any]:
    """Make one draw of every random module of a network, to hold it several times.

    Args:
        net: The network.
        index: The number of the draw.
        generator: CPU generator for its random numbers.

    Examples:
        >>> from bqnn.layers.bayes import to_bayes
        >>> net = to_bayes(nn.Sequential(nn.Linear(3, 2)), prior_std=1.0, init_rho=0.0).eval()
        >>> made = make_draw(net, 0, torch.Generator().manual_seed(0))
        >>> with held_draw(net, 0, made=made):
        ...     first = net(torch.ones(1, 3))
        >>> with held_draw(net, 0, made=made):
        ...     torch.equal(net(torch.ones(1, 3)), first)
        True
    """
    with held_draw(net, index, generator):
        draw = _held.get()
        assert draw is not None
        return {module: draw.values[module] for module in net.modules() if module in draw.values}


def evaluation_noise(like: Tensor) -> Tensor:
    """Sample N(0, 1) noise with the shape, layout, dtype and device of a tensor.

    The numbers come from the CPU generator of the held draw, or from torch's global generator,
    in the order of the dimensions. So a draw is the same network on every device and in every
    memory layout.
    """
    if torch.compiler.is_compiling():
        return torch.randn_like(like)
    draw = _held.get()
    if draw is None:
        return cpu_noise_like(like, torch.default_generator)
    return draw.of_rows(like, lambda whole: cpu_noise_like(whole, draw.generator))


def evaluation_uniform(like: Tensor) -> Tensor:
    """Sample uniform numbers in [0, 1) with the shape and device of a tensor.

    The generator is that of `evaluation_noise`.
    """
    if torch.compiler.is_compiling():
        return torch.rand_like(like)
    draw = _held.get()
    generator = torch.default_generator if draw is None else draw.generator
    return torch.rand(like.shape, generator=generator).to(like.device)


def correlated_noise(like: Tensor, loadings: Tensor | None) -> Tensor:
    """Sample N(0, 1) noise for the weights of a layer, whose entries may be correlated.

        eps_i = sqrt(1 - sum_k f_ki^2) z_i + sum_k f_ki u_k,    z_i, u_k ~ N(0, 1)

    All layers of a held draw share u, so that their weights are correlated, too. A layer that is
    called without a held draw has a u of its own.

    Args:
        like: A tensor with the shape, layout, dtype and device of the result.
        loadings: f [K, *like.shape] with sum_k f_ki^2 <= 1, or None for independent noise.

    Examples:
        >>> loadings = torch.tensor([[0.6, 0.6]])
        >>> eps = torch.stack([correlated_noise(torch.zeros(2), loadings) for _ in range(10_000)])
        >>> torch.allclose(eps.T.cov(), torch.tensor([[1.0, 0.36], [0.36, 1.0]]), atol=0.06)
        True
    """
    if loadings is None:
        return evaluation_noise(like)
    common = _common_noise(len(loadings)).to(like)
    eps = evaluation_noise(like)
    own = (1 - loadings.square().sum(0)).clamp_min(0).sqrt()
    return eps.mul_(own).add_(torch.tensordot(common, loadings, 1))


def _common_noise(count: int) -> Tensor:
    """Return the N(0, 1) noise [count] that all layers of the held draw share."""
    draw = None if torch.compiler.is_compiling() else _held.get()
    if draw is None:
        return torch.randn(count, device="cpu")
    if count not in draw.common:
        draw.common[count] = torch.randn(count, generator=draw.generator, device="cpu")
    return draw.common[count]


def evaluation_coins(like: Tensor, probability: float) -> Tensor:
    """Sample booleans that are True with a probability, with the shape and device of a tensor.

    The generator is that of `evaluation_noise`.

    Args:
        like: A tensor with the shape and device of the result.
        probability: Probability of True, from 0 to 1.
    """
    draw = None if torch.compiler.is_exporting() else _held.get()
    if draw is not None:
        return _coins_of(draw, like, probability)
    return coins_like(like, probability, torch.default_generator)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _coins_of(draw: Draw, like: Tensor, probability: float) -> Tensor:
    return draw.of_rows(like, lambda whole: coins_like(whole, probability, draw.generator))
