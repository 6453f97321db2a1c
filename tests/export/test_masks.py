"""Masks of MC dropout that a file draws itself."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bqnn.export.masks import MaskStatistics
from bqnn.export.model import Exported, export
from bqnn.export.verification import Verification, verify
from bqnn.methods import Method
from bqnn.quant.integer import convert
from bqnn.quant.onnx.session import start_session
from tests.export.networks import quantized, rows_for, run
from tests.quant.conftest import SHAPES, float_net

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def model_of(net: str, **options: Any) -> Method:
    return quantized(float_net("mcdropout", net), SHAPES[net], **options)


def verified(model: Method, exported: Exported) -> Verification:
    rows = rows_for(model, 600)
    session = start_session(exported.content(with_masks=True), 1)
    return verify(session, exported, model, rows, torch.zeros(len(rows)).long())


@pytest.mark.parametrize("net", SHAPES)
def test_int8_with_the_masks_of_the_file_is_equal(net: str) -> None:
    model = model_of(net)
    exported = export(model, 3, masks="random")
    model.net = convert(deepcopy(model.net))
    found = verified(model, exported)
    found.require_equal()
    assert (found.record()["masks"], found.differing) == ("random", 0)
    assert found.prediction.samples.std(0).mean() > 0


def test_each_row_and_call_and_draw_has_its_own_masks() -> None:
    model = model_of("lenet")
    exported = export(model, 4, masks="random")
    row = rows_for(model, 1).expand(200, -1, -1, -1)
    session = start_session(exported.content(with_masks=True), 1)
    shown = [port.name for port in exported.masks]
    calls = [session.run(shown, {"inputs": row.numpy()}) for _ in range(2)]
    per_draw = len(shown) // 4
    for first, second in zip(*calls, strict=True):
        assert (first != second).mean() == pytest.approx(2 * 0.25 * 0.75, abs=0.05)
    for place in range(per_draw):
        one, other = calls[0][place], calls[0][place + per_draw]
        assert (one != other).mean() == pytest.approx(2 * 0.25 * 0.75, abs=0.05)
    outputs = run(exported, row)["samples"]
    assert len(np.unique(outputs[0], axis=0)) > 100
    again = run(exported, row)["samples"]
    assert np.array_equal(outputs, again)  # a new session begins with the same masks


def test_the_predictive_distribution_is_that_of_bqnn() -> None:
    model, num_samples = model_of("mlp"), 400
    row = rows_for(model, 1)
    exported = export(model, 4, masks="random")
    found = run(exported, row.expand(num_samples // 4, -1))["samples"].reshape(num_samples, -1)
    model.net = convert(deepcopy(model.net))
    inputs = ((row - 0.4) / 0.3).float().expand(num_samples, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model.net(inputs).numpy()
    error = (found.var(0) / num_samples + expected.var(0) / num_samples) ** 0.5
    assert (abs(found.mean(0) - expected.mean(0)) < 5 * error).all()
    np.testing.assert_allclose(found.std(0), expected.std(0), rtol=0.3)


def changed(masks: list[Tensor], how: str) -> list[Tensor]:
    if how == "all kept":
        return [torch.ones_like(mask) for mask in masks]
    if how == "rows":
        return [mask[:1].expand_as(mask) for mask in masks]
    return [masks[0], masks[0]]


@pytest.mark.parametrize("how", ["all kept", "rows", "draws"])
def test_masks_that_are_not_random_are_a_failure(how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(200, 30, 1, 1, generator=generator) >= 0.25 for _ in range(2)]
    statistics = MaskStatistics([0.25, 0.25], num_samples=2)
    statistics.add(masks)
    statistics.require_random()
    statistics.add(changed(masks, how))
    with pytest.raises(ValueError, match="does not draw independent numbers; use masks=fixed"):
        statistics.require_random()


def test_rare_drops_are_no_failure() -> None:
    statistics = MaskStatistics([1e-6], num_samples=1)
    mask = torch.ones(100, 10, dtype=torch.bool)
    mask[3, 3] = False  # expected: 0.001
    statistics.add([mask])
    statistics.require_random()


def test_a_network_without_mc_dropout_is_refused() -> None:
    model = quantized(float_net("bbb", "mlp"), SHAPES["mlp"])
    with pytest.raises(ValueError, match="masks=random: the network has no MC dropout"):
        export(model, 2, masks="random")


def test_openvino_draws_masks() -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    model = model_of("lenet")
    exported, rows = export(model, 2, masks="random"), rows_for(model)
    core = openvino.Core()
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    content = exported.content(with_masks=True)
    compiled = core.compile_model(core.read_model(content), "CPU", precise)
    found = compiled({"inputs": rows.numpy()})
    statistics = MaskStatistics(exported.rates, num_samples=2)
    statistics.add([torch.from_numpy(found[port.name].copy()) for port in exported.masks])
    statistics.require_random()
    assert not np.array_equal(found["samples"][0], found["samples"][1])
