"""Graphed steps without a GPU: graphs that repeat their Python code stand in for CUDA graphs."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from bqnn.data import TensorLoader
from bqnn.methods import METHODS, Method, graphs
from bqnn.methods.graphs import GraphedSteps, _Graph
from tests.bare_trainer import bare_trainer
from tests.recorded_losses import Losses
from tests.small_methods import image_method, images, table, table_method


class RepeatedCode:
    """Stands in for a CUDA graph."""

    owner: _Graph

    def replay(self) -> None:
        with self.owner.method.numbers_given(self.owner.numbers):
            terms, gradients = self.owner._step()
        found = [gradient for gradient in gradients if gradient is not None]
        for (_, old), new in zip(self.owner.gradients, found, strict=True):
            old.copy_(new)
        values = [torch.as_tensor(term).detach() for term in terms.values()]
        self.owner.values.copy_(torch.stack(values))


class GraphOnCpu(_Graph):
    def _warm_up(self) -> None:
        self._step()

    def _capture(self) -> None:
        with graphs._nothing_changed(self.method):  # a capture runs nothing
            super()._capture()
        assert isinstance(self.graph, RepeatedCode)
        self.graph.owner = self


@contextmanager
def kept_random_state(_: object) -> Iterator[None]:
    with torch.random.fork_rng([]):
        yield


@pytest.fixture
def cpu_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_Graph", GraphOnCpu)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RepeatedCode)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(graphs, "_kept_random_state", kept_random_state)


class Record(Losses):
    """Lets steps be graphed on request, too."""

    def __init__(self, is_graphed: bool) -> None:
        super().__init__()
        self.is_graphed = is_graphed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_graphed:
            assert isinstance(pl_module, Method)
            pl_module.compiled_terms = GraphedSteps(pl_module)


def trained(
    model: Method, rows: TensorLoader, is_graphed: bool, num_graphs: int = 1
) -> tuple[list[Tensor], Any]:
    record = Record(is_graphed)
    bare_trainer(4, callbacks=[record]).fit(model, rows)
    assert record.num_graphs == (num_graphs if is_graphed else 0)
    return record.losses, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.usefixtures("cpu_graphs")
@pytest.mark.parametrize("method", METHODS)
def test_a_graphed_training_is_bit_equal(method: str) -> None:
    for make, rows in ((image_method, images), (table_method, table)):
        expected = trained(make(method), rows(), False)
        seen = trained(make(method), rows(), True)
        torch.testing.assert_close(seen, expected, atol=0, rtol=0)


@pytest.mark.usefixtures("cpu_graphs")
def test_a_number_that_grows_is_read_in_each_step() -> None:
    expected, seen = (
        trained(image_method("bbb", warmup_epochs=3), images(), is_graphed)
        for is_graphed in (False, True)
    )
    torch.testing.assert_close(seen, expected, atol=0, rtol=0)


@pytest.mark.usefixtures("cpu_graphs")
def test_a_step_that_cannot_be_captured_runs_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: _Graph) -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(GraphOnCpu, "_warm_up", refuse)
    monkeypatch.setattr(graphs, "_replace_generator", lambda device, state: None)
    expected = trained(table_method("bbb"), table(), False)
    with caplog.at_level("WARNING"):
        seen = trained(table_method("bbb"), table(), True, num_graphs=0)
    assert sum("cannot be captured" in text for text in caplog.messages) == 1
    torch.testing.assert_close(seen, expected, atol=0, rtol=0)
