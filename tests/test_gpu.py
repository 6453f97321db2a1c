"""Tests on a GPU. BQNN_TEST_DEVICE=cpu runs them on the CPU."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bqnn.checkpoints.recipe import load
from bqnn.data import TensorData
from bqnn.data.task import make_data
from bqnn.methods import METHODS
from tests.running import run_script

DEVICE = os.environ.get("BQNN_TEST_DEVICE", "cuda")
TOLERANCE = 1e-3  # of a metric or an output, between devices: sums are added up in another order
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch finds no GPU here"
    ),
    pytest.mark.usefixtures("visible_gpus"),
]
by_method = pytest.mark.parametrize("method", METHODS)

Metrics = dict[str, float]


def metrics(folder: Path) -> Metrics:
    values: Metrics = json.loads((folder / "metrics.json").read_text())
    return values


def accelerator(device: str) -> str:
    return f"trainer.accelerator={device}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train and fine-tune to 8 bits on the device; return the folder of each method."""
    made: dict[str, Path] = {}

    def folder(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp(method)
            _train_and_quantize(method, made[method])
        return made[method]

    return folder


def _train_and_quantize(method: str, folder: Path) -> None:
    options = ["logger=none", "plots=false", accelerator(DEVICE)]
    sizes = ["net=lenet", "trainer.max_epochs=3"]
    sizes += [] if method == "pointwise" else ["method.num_samples=3"]
    sizes += ["method.burn_in=1", "method.collect_every=1"] if method == "sghmc" else []
    run_script(
        "train",
        f"method={method}",
        "task=digits",
        *sizes,
        *options,
        f"hydra.run.dir={folder}/float",
    )
    tuning = ["quant.mode=qat", "quant.fine_tuning.max_epochs=1"]
    run_script(
        "quantize",
        f"checkpoint={folder}/float/checkpoint.ckpt",
        *tuning,
        *options,
        f"hydra.run.dir={folder}/qat",
    )


def inputs(model_path: Path) -> Tensor:
    """Return the first test images of the model's task, normalized."""
    recipe = load(model_path).recipe
    assert recipe is not None
    data: TensorData = make_data({**recipe, "data_dir": "data"})
    return data.normalize(data.test.inputs[:64])


@by_method
def test_every_method_trains_and_is_quantized_on_the_device(
    method: str, runs: Callable[[str], Path]
) -> None:
    folder = runs(method)
    assert metrics(folder / "float")["test/error"] < 0.7  # chance is 0.9
    found = metrics(folder / "qat")
    assert abs(found["int8/test/nll"] - found["simulated/test/nll"]) < 0.1


@by_method
def test_a_checkpoint_of_the_device_is_loaded_on_the_cpu(
    method: str, runs: Callable[[str], Path]
) -> None:
    for stage in ("float", "qat"):
        model = load(runs(method) / stage / "checkpoint.ckpt")
        assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
        out = model.predictive(inputs(runs(method) / stage / "checkpoint.ckpt"))
        assert out.isfinite().all()


@by_method
def test_the_same_draw_is_the_same_network_on_both_devices(
    method: str, runs: Callable[[str], Path]
) -> None:
    path = runs(method) / "float" / "checkpoint.ckpt"
    x, model = inputs(path), load(path)
    expected = model.predictive(x, 2)
    seen = model.to(DEVICE).predictive(x.to(DEVICE), 2).cpu()
    torch.testing.assert_close(seen, expected, atol=TOLERANCE, rtol=TOLERANCE)


@by_method
@pytest.mark.parametrize("stage", ["float", "qat"])
def test_metrics_agree_on_both_devices(
    method: str, stage: str, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    found = []
    for device, folder in (("cpu", tmp_path / "first"), (DEVICE, tmp_path / "second")):
        arguments = [f"checkpoint={runs(method)}/{stage}/checkpoint.ckpt", accelerator(device)]
        run_script("evaluate", *arguments, "plots=false", "logger=none", f"hydra.run.dir={folder}")
        found.append(metrics(folder))
    on_cpu, on_device = found
    assert on_cpu.keys() == on_device.keys()
    for name, value in on_cpu.items():
        if name.endswith(("/nll", "/error")):
            assert on_device[name] == pytest.approx(value, abs=10 * TOLERANCE), name


@by_method
def test_sums_of_integers_are_exact_on_the_device(method: str, runs: Callable[[str], Path]) -> None:
    """A matrix product in TF32 would round them."""
    from bqnn.quant.simulated import SimulatedLayer

    net = load(runs(method) / "qat" / "checkpoint.ckpt").net.to(DEVICE)
    layers = [layer for layer in net.modules() if isinstance(layer, SimulatedLayer)]
    assert layers
    for layer in layers:
        shape = layer.rounded_weight(layer.fold()[0]).shape
        size: tuple[int, ...] = (
            4,
            shape[1] * (1 if layer.geometry is None else layer.geometry.groups),
        )
        size += () if layer.geometry is None else (9, 9)
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, 128, size, generator=generator).float()
        weight = torch.randint(-127, 128, shape, generator=generator).float()
        exact = layer.linear_map(x.double(), weight.double())
        seen = layer.exact_sums(x.to(DEVICE), weight.to(DEVICE), 127).cpu()
        assert torch.equal(seen.double(), exact.float().double())
