"""The diagonal of the Fisher information of Gaussian weights' means."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bqnn.layers.bayes import GaussianWeight, held_means


class Call(NamedTuple):
    """A call of a layer.

    Attributes:
        layer: The layer.
        columns: What each of the L positions of the output reads [B, groups, I, L].
        output: The output, before any operation in place.
    """

    layer: GaussianWeight
    columns: Tensor
    output: Tensor


def fisher_diagonal(
    net: nn.Module, batches: Iterable[Tensor], factors: Callable[[Tensor], Tensor]
) -> dict[GaussianWeight, Tensor]:
    r"""Sum the diagonal of the Fisher information over rows, at the means of the weights.

    For rows n with outputs f_n and the Fisher information \sum_k l_nk l_nk^T of these outputs,

        F_ii = \sum_n \sum_k (l_nk^T df_n / dw_i)^2,

    which is exact, and equal to the diagonal of the generalized Gauss-Newton matrix. It takes one
    backward pass per factor.

    Args:
        net: The network, in evaluation mode.
        batches: Inputs [B, ...].
        factors: Computes l from the outputs: [B, num_outputs] -> [K, B, num_outputs].

    Returns:
        For each layer with Gaussian weights that is not frozen, a tensor like its means.

    Raises:
        TypeError: A layer merges the rows of a batch with another dimension.

    Examples:
        >>> from bqnn.layers.bayes import to_bayes
        >>> net = to_bayes(nn.Sequential(nn.Linear(2, 1, bias=False))).eval()
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> fisher_diagonal(net, [x], lambda output: torch.ones_like(output)[None])[net[0]]
        tensor([[10., 20.]])
    """
    layers = [
        module
        for module in net.modules()
        if isinstance(module, GaussianWeight) and module.mean.requires_grad
    ]
    sums = {layer: torch.zeros_like(layer.mean) for layer in layers}
    for inputs in batches:
        with torch.enable_grad(), _recorded(layers, len(inputs)) as calls, held_means(net):
            outputs = net(inputs)
        results = [call.output for call in calls]
        for factor in factors(outputs.detach()):
            gradients = torch.autograd.grad(
                *(outputs, results, factor),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for layer, squares in _squares(calls, gradients):
                sums[layer] += squares.reshape(layer.mean.shape)
    return sums


@contextmanager
def _recorded(layers: Iterable[GaussianWeight], num_rows: int) -> Iterator[list[Call]]:
    """Record the calls of layers."""
    calls: list[Call] = []

    def record(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        assert isinstance(layer, GaussianWeight)
        (x,) = args
        if len(x) != num_rows:
            raise TypeError(
                f"laplace: a {type(layer).__name__} reads {len(x)} rows for {num_rows} inputs, and "
                "their gradients cannot be told apart by input; keep the rows of a batch in the "
                "first dimension, or choose another method"
            )
        calls.append(Call(layer, _columns(layer, x.detach()), output))
        return output.clone()  # for operations in place

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _columns(layer: GaussianWeight, x: Tensor) -> Tensor:
    """Return what each position of the output reads: [B, groups, I, L]."""
    if layer.geometry is None:
        return x.reshape(len(x), 1, -1, x.shape[-1]).transpose(2, 3)
    stride, padding, dilation, groups = layer.geometry
    size = tuple(layer.mean.shape[2:])
    read = F.unfold(x, size, dilation=dilation, padding=padding, stride=stride)
    return read.reshape(len(x), groups, -1, read.shape[-1])


def _squares(
    calls: list[Call], gradients: Iterable[Tensor]
) -> Iterator[tuple[GaussianWeight, Tensor]]:
    """Yield the squared gradients by each layer's weights, summed over rows: [groups, O, I]."""
    parts: dict[GaussianWeight, list[tuple[Tensor, Tensor]]] = {}
    for (layer, columns, _), gradient in zip(calls, gradients, strict=True):
        if layer.geometry is None:
            gradient = gradient.reshape(len(gradient), 1, -1, gradient.shape[-1]).transpose(2, 3)
        else:
            gradient = gradient.reshape(*columns.shape[:2], -1, columns.shape[-1])
        parts.setdefault(layer, []).append((gradient, columns))
    for layer, pairs in parts.items():
        if len(pairs) == 1 and pairs[0][0].shape[-1] == 1:  # the square of a product
            gradient, columns = (part.squeeze(-1).square() for part in pairs[0])
            yield layer, torch.einsum("bgo,bgi->goi", gradient, columns)
            continue
        by_row = [torch.einsum("bgol,bgil->bgoi", *pair) for pair in pairs]
        yield layer, torch.stack(by_row).sum(0).square().sum(0)
