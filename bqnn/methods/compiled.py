"""CompileSteps: faster training steps, by CUDA graphs or torch.compile."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from bqnn.layers.markers import Quantized
from bqnn.methods.base import Method
from bqnn.methods.graphs import GraphedSteps
from bqnn.methods.terms import Gradients, Terms
from bqnn.text import one_line, short

log = logging.getLogger(__name__)


class CompileSteps(pl.Callback):
    """Compile the training steps of a `Method`.

    On a GPU, forward and backward pass become a CUDA graph. Its results differ from those of single
    kernels by rounding at most. On the CPU, the forward pass of the network is compiled with
    torch.compile, which takes a C++ compiler. It draws other random numbers.

    Where a step cannot be compiled, it runs as it is, and the log has one line about it.

    Examples:
        >>> trainer = pl.Trainer(callbacks=[CompileSteps()], logger=False, accelerator="cpu")
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        reason = _reason_against(trainer, pl_module)
        if reason is not None:
            log.warning("compile: %s; training steps are not compiled", reason)
        elif pl_module.device.type == "cuda":
            pl_module.compiled_terms = GraphedSteps(pl_module)
        else:
            pl_module.compiled_terms = CompiledSteps(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        if isinstance(pl_module.compiled_terms, GraphedSteps):
            pl_module.zero_grad()  # gradients are in the memory of the graphs
        pl_module.compiled_terms = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)


class CompiledSteps:
    """Computes the loss of a batch with the forward passes of the networks compiled.

    Args:
        method: The method.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.gradients: Gradients | None = None  # the backward pass is not part of it
        self.forwards = {
            net: torch.compile(net.forward, dynamic=False) for net in method.trained_networks()
        }

    def __call__(self, inputs: Tensor, targets: Tensor) -> Terms:
        """Return the terms of the loss, as `Method.loss_terms` does."""
        try:
            with _replaced(self.forwards):
                return self.method.loss_terms(inputs, targets)
        except torch._dynamo.exc.TorchDynamoException as error:
            if not self.forwards:
                raise
            self.forwards = {}
            log.warning(
                "compile: torch.compile does not support the network, or finds no C++ compiler "
                "(%s); it runs as it is",
                short(one_line(str(error)), 200),
            )
            return self.method.loss_terms(inputs, targets)


def _reason_against(trainer: pl.Trainer, method: Method) -> str | None:
    if trainer.world_size > 1:
        return "several devices train the network"
    if trainer.accumulate_grad_batches > 1:
        return "gradients of several batches are accumulated"
    if any(isinstance(module, Quantized) for module in method.net.modules()):
        return "the network has fake quantization, whose ranges follow the data"
    return None


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Let networks run other functions as their `forward`."""
    for net, forward in forwards.items():
        net.forward = forward
    try:
        yield
    finally:
        for net in forwards:
            del net.forward  # what the class has is used again
