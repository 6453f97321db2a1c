"""Monte-Carlo prediction."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.arguments import ArgumentTypeError, whole_number
from bqnn.inference.early_stop import EarlyDraws, numbers_of_draws
from bqnn.inference.passes import Passes
from bqnn.inference.precision import full_precision
from bqnn.layers.bayes import JointPosterior
from bqnn.layers.draws import Drawn, held_draw, make_draw
from bqnn.layers.finite import refuse_non_finite
from bqnn.seeds import Stream, stream_seed
from bqnn.text import short

BATCH_SIZE = 256
MAX_KEPT_BYTES = 512 * 2**20  # for the activations before the first random layer


def predictive(
    net: nn.Module, x: Tensor, num_samples: int, *, seed: int = 0, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Stack independent draws of a network's output.

    Equal seeds give equal draws on every device; dropout masks also depend on the rows and on
    `batch_size`. The function neither uses nor changes the global random state. Several threads
    can predict with one network; each gets the same result as alone.

    Args:
        net: The network, in evaluation mode.
        x: Inputs [B, ...].
        num_samples: The number of draws S.
        seed: The seed of the run.
        batch_size: The number of rows in a forward pass.

    Returns:
        Draws of the output [S, B, ...].

    Raises:
        ValueError: The network is in training mode, inputs are not finite, or a number is out of
            range.
        TypeError: `x` is not a tensor that the network takes, or an output is not a tensor.

    Examples:
        >>> from bqnn.layers.bayes import to_bayes
        >>> net = to_bayes(nn.Sequential(nn.Linear(3, 2)), prior_std=1.0, init_rho=-5.0).eval()
        >>> predictive(net, torch.zeros(4, 3), num_samples=10).shape
        torch.Size([10, 4, 2])
    """
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise ArgumentTypeError(
            f"x={short(x)} is not a tensor of inputs [B, ...]; use torch.as_tensor", "x"
        )
    try:
        (samples,) = predictive_sets(net, [x], num_samples, seed=seed, batch_size=batch_size)
    except RuntimeError as error:
        if x.is_floating_point():
            raise
        raise ArgumentTypeError(
            f"x has dtype {x.dtype}, which the network does not take "
            f"({short(str(error), 120)}); pass x.float()",
            "x",
        ) from error
    return samples


@full_precision()
@torch.no_grad()
def predictive_sets(
    net: nn.Module,
    sets: Sequence[Tensor],
    num_samples: int,
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    bank: Bank | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Predict several sets of inputs, each bit-equal to `predictive`.

    Each draw of the weights is made once, and processes all sets. In nested Sequentials, the
    activations before the first random layer are computed once, if there is memory for them.

    Args:
        net: The network, in evaluation mode.
        sets: Sets of inputs [B, ...].
        num_samples: The number of draws S.
        prepare: Converts the rows of a batch to inputs, so that sets can be stored in a smaller
            format; None for the identity.
        seed: The seed of the run.
        batch_size: The number of rows in a forward pass.
        bank: Draws of the weights of this network that were made before; None to make them.
        progress: Called with the index of a set and of a draw, after each draw of a set.

    Returns:
        Draws of the output [S, B, ...] for each set.

    Raises:
        ValueError: The network is in training mode, or inputs are not finite.

    Examples:
        >>> net = nn.Linear(3, 2).eval()
        >>> sets = [torch.zeros(4, 3), torch.zeros(5, 3)]
        >>> [draws.shape for draws in predictive_sets(net, sets, num_samples=1)]
        [torch.Size([1, 4, 2]), torch.Size([1, 5, 2])]
    """
    found = _predict(net, sets, num_samples, None, prepare, seed, batch_size, bank, progress)
    return [draws for draws, _ in found]


@full_precision()
@torch.no_grad()
def predictive_until_settled(
    net: nn.Module,
    sets: Sequence[Tensor],
    max_samples: int,
    is_settled: Callable[[Tensor], Tensor],
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    bank: Bank | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[EarlyDraws]:
    """Predict several sets of inputs; rows whose prediction has settled make no more draws.

    The rows are judged after 2, 4, 8, ... draws. Their draws are the first ones of
    `predictive_sets`. Int8 and simulated networks give the same bits; a float network may round
    otherwise when it computes fewer rows. A batch therefore keeps at least 16 of its rows as long
    as one of them is not settled, which gave the same bits on every CPU that was tried.

    Args:
        net: The network, in evaluation mode.
        sets: Sets of inputs [B, ...].
        max_samples: The largest number of draws S of a row.
        is_settled: Judges rows by their draws so far [n, B, ...]; returns booleans [B].
        prepare: As in `predictive_sets`; so are the other arguments.
        seed: The seed of the run.
        batch_size: The number of rows in a forward pass.
        bank: Draws of the weights of this network that were made before; None to make them.
        progress: Called with the index of a set and of a draw, after each draw of a set.

    Returns:
        The draws of each set.

    Raises:
        ValueError: The network is in training mode, or inputs are not finite.

    Examples:
        >>> net = nn.Linear(3, 2).eval()
        >>> def always(draws):
        ...     return torch.ones(draws.shape[1], dtype=torch.bool)
        >>> (draws,) = predictive_until_settled(net, [torch.zeros(4, 3)], 20, always)
        >>> draws.samples.shape, draws.num_samples
        (torch.Size([2, 4, 2]), tensor([2, 2, 2, 2]))
    """
    found = _predict(net, sets, max_samples, is_settled, prepare, seed, batch_size, bank, progress)
    return [EarlyDraws(*draws) for draws in found]


def _predict(
    net: nn.Module,
    sets: Sequence[Tensor],
    num_samples: int,
    is_settled: Callable[[Tensor], Tensor] | None,
    prepare: Callable[[Tensor], Tensor] | None,
    seed: int,
    batch_size: int,
    bank: Bank | None,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[Tensor, Tensor]]:
    """Return draws [S, B, ...] and the number of draws of each row [B], for each set."""
    if net.training:
        raise ValueError("predictive: the network is in training mode; call eval() on it first")
    num_samples = whole_number("num_samples", num_samples, "at least one draw is needed", 1)
    batch_size = whole_number("batch_size", batch_size, "a pass takes at least one row", 1)
    seed = whole_number("seed", seed, "choose 0 to 2**63 - 1", 0, 2**63 - 1)
    for index, x in enumerate(sets):
        refuse_non_finite(x, f"inputs of set {index}" if len(sets) > 1 else "inputs")
    # Without random weights, sets are processed one by one, and each can use all the memory.
    is_drawn = any(isinstance(module, Drawn) for module in net.modules())
    are_made = bank is not None and bank.covers(num_samples, seed)
    posterior = nullcontext() if are_made else JointPosterior(net)  # all draws share it
    looks = [num_samples] if is_settled is None else list(numbers_of_draws(num_samples))
    found: list[tuple[Tensor, Tensor]] = []
    for group in [list(sets)] if is_drawn else [[x] for x in sets]:
        room = MAX_KEPT_BYTES // len(group) if num_samples > 1 else 0
        passes = [Passes(net, x.split(batch_size), num_samples, prepare, room) for x in group]
        for first, last in itertools.pairwise([0, *looks]):
            for index in range(first, last):
                with posterior, evaluation_draw(net, index, seed, bank) as restart_masks:
                    for place, each in enumerate(passes):
                        if each.has_masks:
                            restart_masks()  # masks do not depend on the other sets
                        each.run()
                        if progress is not None:
                            progress(len(found) + place, index)
            if is_settled is not None and last < num_samples:
                for each in passes:
                    each.drop_settled(is_settled)
            if not any(each.has_open_rows for each in passes):
                break
        found += [each.results() for each in passes]
    return found


class Bank:
    """Draws of the weights of a network, kept for many predictions.

    Predictions with a bank are bit-equal to those without. An int8 network packs each draw once.
    The network must not change as long as the bank is used.

    Args:
        net: The network, in evaluation mode.
        num_samples: The number of draws to make.
        seed: The seed of the run.

    Examples:
        >>> from bqnn.layers.bayes import to_bayes
        >>> net = to_bayes(nn.Sequential(nn.Linear(3, 2)), prior_std=1.0, init_rho=-5.0).eval()
        >>> bank, x = Bank(net, num_samples=3), torch.ones(4, 3)
        >>> (draws,) = predictive_sets(net, [x], num_samples=3, bank=bank)
        >>> torch.equal(draws, predictive(net, x, num_samples=3))
        True
    """

    @torch.no_grad()
    def __init__(self, net: nn.Module, num_samples: int, *, seed: int = 0) -> None:
        if net.training:
            raise ValueError("Bank: the network is in training mode; call eval() on it first")
        self.seed = seed
        with full_precision(), JointPosterior(net):
            self.draws = [
                make_draw(net, index, _weights_generator(seed, index))
                for index in range(num_samples)
            ]

    def covers(self, num_samples: int, seed: int) -> bool:
        """Return whether the bank has the first `num_samples` draws of a seed."""
        return seed == self.seed and num_samples <= len(self.draws)

    def get(self, index: int, seed: int) -> dict[nn.Module, Any] | None:
        """Return a draw, or None if the bank does not have it."""
        return self.draws[index] if self.covers(index + 1, seed) else None


def _weights_generator(seed: int, index: int) -> torch.Generator:
    generator = torch.Generator("cpu")
    return generator.manual_seed(stream_seed(seed, Stream.EVALUATION_WEIGHTS, index))


@contextmanager
def evaluation_draw(
    net: nn.Module, index: int, seed: int, bank: Bank | None = None
) -> Iterator[Callable[[], None]]:
    """Hold the draw of a network with which predictions begin that have this seed.

    Args:
        net: The network, in evaluation mode.
        index: The number of the draw.
        seed: The seed of the run.
        bank: Draws that were made before.

    Yields:
        A function to call before each set of rows, which then gets the same masks of MC dropout.
    """
    made = None if bank is None else bank.get(index, seed)
    generator = _weights_generator(seed, index) if made is None else torch.Generator("cpu")

    def restart_masks() -> None:
        generator.manual_seed(stream_seed(seed, Stream.EVALUATION_MASKS, index))

    with held_draw(net, index, generator, made):
        yield restart_masks
