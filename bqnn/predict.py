"""Monte-Carlo prediction."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bqnn.layers.chain import is_chain
from bqnn.layers.draws import Stochastic, held_draw
from bqnn.layers.noise import reseed

FIRST_STREAM = 500_000  # training has the streams of the epochs before it
MAX_KEPT_BYTES = 512 * 2**20  # of what comes before the first random layer


@torch.no_grad()
def predictive(
    net: nn.Module, x: Tensor, num_samples: int, *, seed: int = 0, batch_size: int = 256
) -> Tensor:
    """Stack independent draws of the network's output: [S, B, ...].

    Each draw of random weights passes over all of `x`, `batch_size` rows at a time, before the
    next is made, so that what a draw costs does not grow with the number of rows. What comes
    before the first random layer of nested Sequentials is computed once. Equal seeds
    give equal draws (of dropout masks, for equal rows and `batch_size`); the global random state
    is left as it was. The network must be in
    eval mode, which is a ValueError otherwise: batch norm would learn from what it predicts.
    """
    if net.training:
        raise ValueError("predictive: the network is in training mode; call eval() on it first")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: at least one draw is needed")
    devices = [x.device] if x.device.type == "cuda" else []
    whole, batches = net, x.split(batch_size)
    leading, rest = _split_at_first_random(net)
    if num_samples > 1 and len(leading) > 0:
        first = leading(batches[0])
        if len(batches) * first.numel() * first.element_size() <= MAX_KEPT_BYTES:
            batches = (first, *(leading(rows) for rows in batches[1:]))
            net = rest
    draws = []
    with torch.random.fork_rng(devices):
        for index in range(num_samples):
            reseed(x.device, seed, FIRST_STREAM + index)
            with held_draw(whole, index):
                draws.append(torch.cat([net(rows) for rows in batches]))
    return torch.stack(draws)


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
