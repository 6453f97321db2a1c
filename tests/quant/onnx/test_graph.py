"""Graphs of ONNX operators."""

import numpy as np
import pytest

from bqnn.quant.onnx.graph import Graph, Port

FLOAT = np.dtype(np.float32)


def test_equal_constants_and_calls_stand_once() -> None:
    graph = Graph()
    first = graph.call("Add", "x", graph.constant(np.zeros(2, np.float32)))
    again = graph.call("Add", "x", graph.constant(np.zeros(2, np.float32)))
    assert first == again
    others = (np.zeros((2, 1), np.float32), np.zeros(2), np.ones(2, np.float32))
    assert len({first, *(graph.call("Add", "x", graph.constant(c)) for c in others)}) == 4
    assert graph.call("Cast", "x", to=1) != graph.call("Cast", "x", to=6)


def test_a_graph_that_violates_the_standard_is_refused() -> None:
    pytest.importorskip("onnx")
    graph = Graph()
    out = graph.call("NoSuchOperator", "x")
    with pytest.raises(ValueError, match="violates the ONNX standard"):
        graph.to_onnx([Port("x", FLOAT, ("N",))], {out: Port("y", FLOAT, ("N",))}, {})


def test_constants_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bqnn.quant.onnx.graph.LARGEST_FILE", 1000)
    graph = Graph()
    for _ in range(2):  # the second one is the first
        graph.constant(np.zeros(200, np.float32))
    with pytest.raises(ValueError, match="use a smaller num_samples"):
        graph.constant(np.ones(200, np.float32))
