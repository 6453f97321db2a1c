"""Operations that move elements within rows."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bqnn.quant.onnx.graph import Graph, Port
from bqnn.quant.onnx.moves import write_move
from bqnn.quant.onnx.session import start_session
from bqnn.quant.onnx.values import Value

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    ("move", "operators"),
    [
        (lambda x: x.flatten(1), {"Reshape"}),
        (lambda x: x.view(x.shape[0], -1, 2), {"Reshape"}),
        (lambda x: x.permute(0, 2, 3, 1), {"Transpose"}),
        (lambda x: x.transpose(2, 3), {"Transpose"}),
        (lambda x: x[:, 1:], {"Gather", "Reshape"}),
        (lambda x: x[:, 1], {"Gather", "Reshape"}),
        (lambda x: x.contiguous(), set()),
    ],
)
def test_a_move_is_written(move: Callable[[Tensor], Tensor], operators: set[str]) -> None:
    graph, x = Graph(), torch.randn(3, 2, 4, 6)
    written = write_move(graph, Value("x", x), move, "the move")
    assert isinstance(written, Value)
    assert {call.operator for call in graph.calls} == operators
    float32, rows = np.dtype(np.float32), torch.randn(5, 2, 4, 6)
    expected = move(rows)
    model = graph.to_onnx(
        [Port("x", float32, ("N", 2, 4, 6))],
        {written.name: Port("y", float32, ("N", *expected.shape[1:]))},
        {},
    )
    (found,) = start_session(model.SerializeToString(), 1).run(None, {"x": rows.numpy()})
    assert np.array_equal(found, expected.numpy())


def test_several_outputs() -> None:
    graph = Graph()
    parts = write_move(graph, Value("x", torch.zeros(3, 4)), lambda x: x.chunk(2, 1), "chunk")
    assert isinstance(parts, list)
    assert [part.example.shape for part in parts] == [(3, 2), (3, 2)]


@pytest.mark.parametrize("move", [lambda x: x.flatten(), lambda x: x.transpose(0, 1)])
def test_a_move_of_rows_is_refused(move: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TypeError, match="flatten changes the axis of the rows"):
        write_move(Graph(), Value("x", torch.zeros(3, 4)), move, "flatten")
