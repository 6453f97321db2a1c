"""Monte-Carlo prediction."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from bqnn.arguments import whole_number
from bqnn.inference.precision import full_precision
from bqnn.layers.bayes import JointPosterior
from bqnn.layers.chain import is_chain
from bqnn.layers.draws import Drawn, Stochastic, held_draw
from bqnn.layers.finite import refuse_non_finite
from bqnn.seeds import Stream, stream_seed

BATCH_SIZE = 256
MAX_KEPT_BYTES = 512 * 2**20  # of what comes before the first random layer


def predictive(
    net: nn.Module, x: Tensor, num_samples: int, *, seed: int = 0, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Stack independent draws of the network's output: [S, B, ...].

    Equal seeds give equal draws (of dropout masks, for equal rows and `batch_size`), on every
    device. The global random state is neither used nor changed, and threads may predict with one
    network at the same time: each gets what it would get alone.

    ValueError: the network is in training mode, where batch norm would learn from what it predicts,
    or inputs are not finite.
    """
    (samples,) = predictive_sets(net, [x], num_samples, seed=seed, batch_size=batch_size)
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
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """The draws that `predictive` makes for each set of inputs alone, bit for bit: [S, B, ...].

    Each draw of random weights passes over all sets, `batch_size` rows at a time, before the next
    is made, so that what a draw costs does not grow with the number of rows. What comes before
    the first random layer of nested Sequentials is computed once, where there is room for it.
    `prepare` makes inputs of the rows of a batch, so that sets can wait in a smaller form.
    `progress` is called with the index of a set and of the draw that was made for it.
    """
    if net.training:
        raise ValueError("predictive: the network is in training mode; call eval() on it first")
    num_samples = whole_number("num_samples", num_samples, "at least one draw is needed", 1)
    for index, x in enumerate(sets):
        refuse_non_finite(x, f"inputs of set {index}" if len(sets) > 1 else "inputs")
    # Where a draw costs nothing to begin, each set gets all the room for itself.
    is_drawn = any(isinstance(module, Drawn) for module in net.modules())
    posterior = JointPosterior(net)  # one for all draws
    samples: list[Tensor] = []
    for group in [list(sets)] if is_drawn else [[x] for x in sets]:
        room = MAX_KEPT_BYTES // len(group) if num_samples > 1 else 0
        passes = [_one_pass(net, x.split(batch_size), prepare, room) for x in group]
        draws: list[list[Tensor]] = [[] for _ in group]
        for index in range(num_samples):
            generator = torch.Generator("cpu")
            generator.manual_seed(stream_seed(seed, Stream.EVALUATION_WEIGHTS, index))
            with posterior, held_draw(net, index, generator):
                mask_seed = stream_seed(seed, Stream.EVALUATION_MASKS, index)
                for place, (one_pass, outputs) in enumerate(zip(passes, draws, strict=True)):
                    generator.manual_seed(mask_seed)  # as if there were no other set
                    outputs.append(one_pass())
                    if progress is not None:
                        progress(len(samples) + place, index)
        samples += [torch.stack(outputs) for outputs in draws]
    return samples


def _one_pass(
    net: nn.Module,
    batches: Sequence[Tensor],
    prepare: Callable[[Tensor], Tensor] | None,
    room: int,
) -> Callable[[], Tensor]:
    """What computes one draw of the output for all batches.

    room: bytes that may be kept from one draw to the next.
    """

    def prepared(rows: Tensor) -> Tensor:
        return rows if prepare is None else prepare(rows)

    leading, rest = _split_at_first_random(net)
    if room > 0 and len(leading) > 0:
        first = leading(prepared(batches[0]))
        if len(batches) * first.numel() * first.element_size() <= room:
            kept = [first, *(leading(prepared(rows)) for rows in batches[1:])]
            return lambda: torch.cat([rest(rows) for rows in kept])
    return lambda: torch.cat([net(prepared(rows)) for rows in batches])


def _split_at_first_random(net: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """What nested Sequentials call before their first random module, and the rest of it."""
    steps = list(_steps(net))
    for index, step in enumerate(steps):
        if any(isinstance(module, Stochastic) for module in step.modules()):
            return nn.Sequential(*steps[:index]), nn.Sequential(*steps[index:])
    return nn.Sequential(), nn.Sequential(*steps)


def _steps(net: nn.Module) -> Iterator[nn.Module]:
    if is_chain(net):
        for child in net.children():
            yield from _steps(child)
    else:
        yield net
