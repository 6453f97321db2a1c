"""CompileSteps on the CPU, where torch.compile compiles the forward passes of a training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bqnn.methods import METHODS, CompileSteps
from bqnn.quant.callback import QuantizationCallback
from bqnn.quant.spec import QuantSpec
from tests.bare_trainer import bare_trainer
from tests.small_methods import image_method, images

Forward = Callable[..., Tensor]


@pytest.fixture
def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[Forward]:
    """Replace torch.compile by one that records calls, and compiles nothing."""
    calls: list[Forward] = []

    def compile_(forward: Forward, **_: Any) -> Forward:
        def run(*inputs: Tensor) -> Tensor:
            calls.append(forward)
            return forward(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_the_networks_of_training_steps_are_compiled(
    method: str, compiled_calls: list[Forward]
) -> None:
    model, twin = image_method(method), image_method(method)
    bare_trainer(2, callbacks=[CompileSteps()]).fit(model, images())
    assert len(compiled_calls) == 6 * len(model.trained_networks())
    bare_trainer(2).fit(twin, images())
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), atol=0, rtol=0)
    compiled_calls.clear()
    model.eval().predictive(torch.zeros(2, 1, 8, 8))
    assert not compiled_calls


def test_a_network_that_cannot_be_compiled_trains_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def compile_(forward: Forward, **_: Any) -> Forward:
        def run(*inputs: Tensor) -> Tensor:
            raise TorchDynamoException("no C++ compiler found")

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    model, twin = image_method("bbb"), image_method("bbb")
    bare_trainer(2, callbacks=[CompileSteps()]).fit(model, images())
    assert sum("no C++ compiler found" in text for text in caplog.messages) == 1
    bare_trainer(2).fit(twin, images())
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), atol=0, rtol=0)


def test_fake_quantization_is_not_compiled(
    compiled_calls: list[Forward], caplog: pytest.LogCaptureFixture
) -> None:
    callbacks = [QuantizationCallback(QuantSpec()), CompileSteps()]
    bare_trainer(1, callbacks=callbacks).fit(image_method("pointwise"), images())
    assert not compiled_calls
    assert sum("the network has fake quantization" in text for text in caplog.messages) == 1
