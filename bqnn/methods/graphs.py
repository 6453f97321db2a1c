"""Training steps as CUDA graphs: forward and backward pass of a batch in one launch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bqnn.methods.terms import Gradients, Terms
from bqnn.text import one_line, short

if TYPE_CHECKING:
    from bqnn.methods.base import Method

log = logging.getLogger(__name__)

WARM_UP = 3  # passes before a capture, in which libraries choose their kernels
MOST_GRAPHS = 4  # shapes of batches


class GraphedSteps:
    """Computes the loss of a batch and its gradients as a CUDA graph, one for each shape of batch.

    A graph repeats the same kernels with the numbers of the new batch. Random numbers differ in
    each step: they come from torch's generator of the device, in the same order as without a graph.
    Numbers that change from step to step must be those of `Method.step_numbers`.

    A step that cannot be captured, for instance because it waits for the device, runs without a
    graph; the log has one line about it.

    Args:
        method: The method, on a GPU.

    Attributes:
        gradients: The parameters and gradients of the last step, which the next step overwrites.
            None if it ran without a graph.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.graphs: dict[object, _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()  # graphs never run at the same time
        self.can_capture = True
        self.gradients: Gradients | None = None

    def __call__(self, inputs: Tensor, targets: Tensor) -> Terms:
        """Return the terms of the loss, as `Method.loss_terms` does."""
        key = (*map(_kind, (inputs, targets)), self.method.net.training)
        if self.can_capture and key not in self.graphs and len(self.graphs) < MOST_GRAPHS:
            self._capture(key, inputs, targets)
        graph = self.graphs.get(key)
        if graph is None:
            self.gradients = None
            return self.method.loss_terms(inputs, targets)
        self.gradients = graph.gradients
        return graph.replay(inputs, targets)

    def _capture(self, key: object, inputs: Tensor, targets: Tensor) -> None:
        state = torch.cuda.get_rng_state(self.method.device)
        try:
            self.graphs[key] = _Graph(self.method, inputs, targets, self.pool)
        except RuntimeError as error:
            self.can_capture = False
            _replace_generator(self.method.device, state)
            log.warning(
                "compile: the step cannot be captured as a CUDA graph (%s); it runs without one",
                short(one_line(str(error)), 200),
            )


class _Graph:
    """The captured step for one shape of batch, and its tensors, whose memory never moves."""

    def __init__(self, method: Method, inputs: Tensor, targets: Tensor, pool: Any) -> None:
        self.method = method
        self.inputs, self.targets = inputs.clone(), targets.clone()
        self.numbers = {
            name: torch.tensor(value, device=method.device)
            for name, value in method.step_numbers().items()
        }
        self.params = [param for param in method.parameters() if param.requires_grad]
        self.gradients: Gradients = []
        with method.numbers_given(self.numbers):
            with _nothing_changed(method):
                self._warm_up()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool):
                self._capture()

    def replay(self, inputs: Tensor, targets: Tensor) -> Terms:
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        for name, value in self.method.step_numbers().items():
            self.numbers[name].fill_(value)
        self.graph.replay()
        return dict(zip(self.names, self.values.clone().unbind(), strict=True))

    def _warm_up(self) -> None:
        """Run the step on another stream, and refuse one that waits for the device."""
        current, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(current)
        try:
            with torch.cuda.stream(other):
                for _ in range(WARM_UP):
                    self._step()
                with _without_waiting():
                    self._step()
        finally:
            current.wait_stream(other)

    def _capture(self) -> None:
        terms, gradients = self._step()
        self.names = list(terms)
        device = self.method.device
        self.values = torch.stack(
            [
                term.detach() if isinstance(term, Tensor) else torch.full((), term, device=device)
                for term in terms.values()
            ]
        )
        self.gradients = [
            (param, gradient)
            for param, gradient in zip(self.params, gradients, strict=True)
            if gradient is not None
        ]

    def _step(self) -> tuple[Terms, tuple[Tensor | None, ...]]:
        terms = self.method.loss_terms(self.inputs, self.targets)
        loss = self.method.weighted(terms, len(self.targets))
        with torch.autocast(loss.device.type, enabled=False):  # as Lightning's backward pass
            gradients = torch.autograd.grad(loss, self.params, allow_unused=True)
        return terms, gradients


def _kind(x: Tensor) -> tuple[object, ...]:
    return x.shape, x.dtype, x.stride()


@contextmanager
def _nothing_changed(method: Method) -> Iterator[None]:
    """Restore the buffers of a method and the random state after the body."""
    buffers = [(buffer, buffer.clone()) for buffer in method.buffers()]
    try:
        with _kept_random_state(method.device):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _kept_random_state(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng([device])


@contextmanager
def _without_waiting() -> Iterator[None]:
    """Raise a RuntimeError for operations that wait for the device, as far as torch knows them."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch does not know all of them
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _replace_generator(device: torch.device, state: Tensor) -> None:
    """Give the device a new generator with a state: that of a failed capture cannot be used."""
    torch.cuda.synchronize(device)
    fresh = torch.Generator(device)
    fresh.set_state(state)
    torch.cuda.default_generators[device.index or 0].graphsafe_set_state(fresh)
