"""Monte-Carlo prediction."""

import torch
from torch import Tensor, nn

from bqnn.layers.draws import held_draw
from bqnn.layers.noise import reseed

FIRST_STREAM = 500_000  # training has the streams of the epochs before it


@torch.no_grad()
def predictive(
    net: nn.Module, x: Tensor, num_samples: int, *, seed: int = 0, batch_size: int = 512
) -> Tensor:
    """Stack independent draws of the network's output: [S, B, ...].

    Each draw of random weights passes over all of `x`, `batch_size` rows at a time, before the
    next is made, so that what a draw costs does not grow with the number of rows. Equal seeds
    give equal draws (of dropout masks, for equal rows and `batch_size`); the global random state
    is left as it was. The network must be in
    eval mode, which is a ValueError otherwise: batch norm would learn from what it predicts.
    """
    if net.training:
        raise ValueError("predictive: the network is in training mode; call eval() on it first")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: at least one draw is needed")
    devices = [x.device] if x.device.type == "cuda" else []
    draws = []
    with torch.random.fork_rng(devices):
        for index in range(num_samples):
            reseed(x.device, seed, FIRST_STREAM + index)
            with held_draw(net, index):
                draws.append(torch.cat([net(rows) for rows in x.split(batch_size)]))
    return torch.stack(draws)
