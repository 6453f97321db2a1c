"""Tests on a GPU: python -m pytest tests -m gpu. BQNN_TEST_DEVICE=cpu runs most on the CPU."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bqnn.checkpoints.recipe import load
from bqnn.data import TensorData, TensorLoader
from bqnn.data.digits import DigitsData
from bqnn.data.images import random_crop, random_flip
from bqnn.data.task import make_data
from bqnn.inference.likelihoods import Classification, Regression
from bqnn.methods import METHODS, CompileSteps, MCDropoutMethod, Method, Pointwise
from bqnn.nets import LeNet
from bqnn.quant.engines.rounding import exact_sums
from bqnn.quant.simulated import SimulatedLayer
from tests.bare_trainer import bare_trainer
from tests.recorded_losses import Losses
from tests.running import ROOT, run_script
from tests.small_methods import image_method, images, table, table_method

DEVICE = os.environ.get("BQNN_TEST_DEVICE", "cuda")
TOLERANCE = 1e-3  # of a metric or an output, between devices: sums are added up in another order
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch finds no GPU here"
    ),
    pytest.mark.usefixtures("visible_gpus"),
    pytest.mark.gpu,
]
needs_graphs = pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no CUDA graphs")
by_method = pytest.mark.parametrize("method", METHODS)

Metrics = dict[str, float]


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute convolutions in float32, not in TF32, so that devices can be compared."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


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
    trained = metrics(folder / "float")["test/nll"]
    assert found["float/test/nll"] == pytest.approx(trained, abs=TOLERANCE)
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
    folder = runs(method) / stage
    on_device = metrics(folder)
    arguments = [f"checkpoint={folder}/checkpoint.ckpt", accelerator("cpu"), "plots=false"]
    arguments += ["suite=test"]
    run_script("evaluate", *arguments, "logger=none", f"hydra.run.dir={tmp_path}/run")
    on_cpu = metrics(tmp_path / "run")
    compared = [name for name in on_device.keys() & on_cpu if name.endswith(("/nll", "/error"))]
    assert len(compared) == 2  # of the test
    for name in compared:
        assert on_device[name] == pytest.approx(on_cpu[name], abs=10 * TOLERANCE), name


@by_method
def test_sums_of_integers_are_exact_on_the_device(method: str, runs: Callable[[str], Path]) -> None:
    """A matrix product in TF32 would round them."""
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
        seen = exact_sums(x.to(DEVICE), weight.to(DEVICE), layer.geometry, 127).cpu()
        assert torch.equal(seen.double(), exact.float().double())


def trained(model: Method, rows: TensorLoader, compiles: bool, **options: Any) -> Losses:
    """Train for four epochs on the device, and return the losses."""
    losses = Losses()
    callbacks = [losses, *([CompileSteps()] if compiles else [])]
    trainer = bare_trainer(4, accelerator=DEVICE, callbacks=callbacks, **options)
    trainer.fit(model, rows)
    return losses


def assert_similar(seen: list[Tensor], expected: list[Tensor], tolerance: float = 1e-3) -> None:
    """Compare losses. Kernels whose sums have no fixed order make trainings drift apart."""
    ours, theirs = torch.stack(seen), torch.stack(expected)
    assert len(ours) == len(theirs)
    torch.testing.assert_close(ours[:3], theirs[:3], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours, theirs, atol=30 * tolerance, rtol=30 * tolerance)


@needs_graphs
@by_method
def test_losses_in_cuda_graphs_are_those_of_single_kernels(method: str) -> None:
    for make, rows in ((image_method, images), (table_method, table)):
        expected, seen = (trained(make(method), rows(), compiles) for compiles in (False, True))
        assert seen.num_graphs == 1
        assert_similar(seen.losses, expected.losses)


@needs_graphs
@by_method
def test_graphs_compute_in_mixed_precision_too(method: str) -> None:
    expected, seen = (
        trained(image_method(method), images(), compiles, precision="bf16-mixed")
        for compiles in (False, True)
    )
    assert seen.num_graphs == 1
    assert_similar(seen.losses, expected.losses, tolerance=3e-2)


@needs_graphs
def test_the_last_smaller_batch_has_a_graph_of_its_own() -> None:
    inputs, targets = torch.randn(10, 3), torch.randn(10)
    rows = TensorLoader(inputs, targets, batch_size=4)
    expected, seen = (trained(table_method("bbb"), rows, compiles) for compiles in (False, True))
    assert seen.num_graphs == 2
    assert_similar(seen.losses, expected.losses)


@needs_graphs
@pytest.mark.parametrize("method", ["bbb", "mcdropout"])
def test_each_step_of_a_graph_draws_other_numbers(method: str) -> None:
    """With a learning rate of 0 and one batch, losses differ by their noise only."""
    batch = next(iter(images()))
    model = image_method(method, optimizer={"name": "sgd", "lr": 1e-30})
    losses = trained(model, TensorLoader(*batch, batch_size=4), True).losses
    assert len({float(loss) for loss in losses}) == len(losses)


@needs_graphs
def test_beta_grows_in_a_graph() -> None:
    expected, seen = (
        trained(image_method("bbb", warmup_epochs=3), images(), compiles)
        for compiles in (False, True)
    )
    assert seen.num_graphs == 1
    assert_similar(seen.losses, expected.losses)


class Waits(nn.Module):
    """Waits for the device, which a CUDA graph cannot do."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) < 1e30 else -x


@needs_graphs
def test_a_network_that_waits_for_the_device_trains_without_graphs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def model() -> Method:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), Waits(), nn.Dropout(0.1), nn.Linear(4, 2))
        options = {"num_train": 12, "seed": 0, "optimizer": {"name": "adam"}}
        return MCDropoutMethod(net, Regression(0.0, 1.0), rate=None, **options)

    expected = trained(model(), table(), False)
    with caplog.at_level("WARNING"):
        seen = trained(model(), table(), True)
    assert seen.num_graphs == 0
    assert sum("cannot be captured" in text for text in caplog.messages) == 1
    assert_similar(seen.losses, expected.losses)


@pytest.mark.parametrize("on_device", [True, False])
def test_batches_from_the_device_are_those_of_the_cpu(on_device: bool) -> None:
    class Batches(pl.Callback):
        def __init__(self) -> None:
            self.batches: list[list[Tensor]] = []
            self.place = ""

        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int
        ) -> None:
            self.batches.append([each.cpu() for each in batch])
            loader = trainer.train_dataloader
            assert isinstance(loader, TensorLoader)
            self.place = loader.inputs.device.type

    found = []
    for device in ("cpu", DEVICE):
        data = DigitsData(batch_size=200)
        data.on_device = on_device
        data.setup()
        net = LeNet([1, 8, 8], [10], channels=(2, 3), hidden_features=5)
        likelihood = Classification([str(digit) for digit in range(10)])
        options = {"num_train": len(data.train), "seed": 0, "optimizer": {"name": "adam"}}
        batches = Batches()
        trainer = bare_trainer(2, accelerator=device, callbacks=[batches])
        trainer.fit(Pointwise(net, likelihood, **options), datamodule=data)
        found.append(batches)
    assert found[1].place == (DEVICE if on_device else "cpu")
    for ours, theirs in zip(found[1].batches, found[0].batches, strict=True):
        assert torch.equal(ours[1], theirs[1])
        torch.testing.assert_close(ours[0], theirs[0])  # normalized on the device


def test_batches_are_augmented_on_the_device() -> None:
    torch.manual_seed(0)
    batch = torch.randint(1, 256, (64, 3, 8, 8), dtype=torch.uint8, device=DEVICE)
    shifted = random_crop(batch, padding=2)
    assert shifted.device.type == DEVICE
    assert shifted.shape == batch.shape
    windows = F.pad(batch, [2] * 4).unfold(2, 8, 1).unfold(3, 8, 1).flatten(2, 3)
    equal = (windows == shifted[:, :, None]).all(-1).all(-1).all(1)  # [B, windows]
    assert equal.any(1).all()
    assert equal.float().argmax(1).unique().numel() > 10  # of 25 windows
    flipped = (random_flip(batch) == batch.flip(-1)).all(-1).all(-1).all(-1)
    assert 10 < flipped.sum() < 54


@needs_graphs
def test_a_killed_training_in_graphs_continues_as_if_it_had_not_been(tmp_path: Path) -> None:
    arguments = ["method=bbb", "task=digits", "trainer.max_epochs=15", "method.num_samples=3"]
    arguments += ["logger=none", "plots=false", "trainer.compile=true", "trainer.save_every=0"]
    arguments += [accelerator(DEVICE)]
    run_script("train", *arguments, f"hydra.run.dir={tmp_path}/whole")
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py"), *arguments, f"hydra.run.dir={folder}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (folder / "checkpoint.ckpt").exists():
            time.sleep(0.01)
        process.kill()
    run_script("train", *arguments, "resume=true", f"hydra.run.dir={folder}")
    expected, seen = metrics(tmp_path / "whole"), metrics(folder)
    assert seen["test/nll"] == pytest.approx(expected["test/nll"], abs=0.02)


def test_laplace_chooses_its_prior_on_the_device() -> None:
    method = image_method("laplace", prior="validation")
    options: dict[str, Any] = {"accelerator": "cpu" if DEVICE == "cpu" else "gpu"}
    trainer = bare_trainer(1, num_sanity_val_steps=0, inference_mode=False, **options)
    trainer.fit(method, images(), images())
    draws = method.eval().predictive(images().inputs.to(method.device))
    assert not torch.equal(draws[0], draws[1])
