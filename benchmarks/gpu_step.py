"""Time training steps on a GPU: python benchmarks/gpu_step.py

ResNet-18 of width 24, batches of 256 random images [3, 32, 32], which are cropped and mirrored as
those of CIFAR-10. The columns are milliseconds per step, medians:

- hand eager: forward, backward and fused Adam in a loop over one batch on the device;
- hand graph: the same as one CUDA graph, which is the least that these kernels take;
- train.py: the whole path (data, augmentation, Lightning), within an epoch after its first steps;
- compiled: the same with trainer.compile=true.

Then follow epochs of 176 steps with a validation of 5,000 rows, and the time from the start of
`python train.py` to its first step with 60,000 JPEG files, without and with the kept pixels.
"""

import argparse
import io
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from random_data import RandomImages
from torch import Tensor
from torch.optim import Optimizer
from train_step import configuration, seconds

from bqnn.checkpoints.recipe import build, make_recipe
from bqnn.jobs.job import Job
from bqnn.methods import Method
from bqnn.training.trainer import fit, make_trainer

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("pointwise", "bbb")
PRECISIONS = {"TF32": "32-true", "bf16": "bf16-mixed"}
NORMALIZED = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_padding": 4, "flip": True}
BATCH_SIZE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=50, help="steps per measurement")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each training")
    parser.add_argument("--files", type=int, default=60_000, help="JPEG files; 0 for none")
    parser.add_argument("--width", type=int, default=24, help="width of the ResNet")
    parser.add_argument("--num-images", type=int, default=50_000, help="images of whole epochs")
    arguments = parser.parse_args()
    is_gpu = arguments.device == "cuda"
    logging.getLogger("bqnn.methods.bbb").setLevel(logging.ERROR)  # sigma does not converge here
    print(torch.cuda.get_device_name() if is_gpu else "CPU", "torch", torch.__version__)

    print(f"\n{'ms per step':<20} hand eager  hand graph    train.py    compiled  compiled/graph")
    for method in METHODS:
        for label, precision in PRECISIONS.items():
            times = _steps(method, precision, arguments)
            ratio = times[3] / times[1] if is_gpu else float("nan")
            cells = "  ".join(f"{1e3 * each:10.2f}" for each in times)
            print(f"{method + ' ' + label:<20} {cells}  {ratio:10.2f}", flush=True)

    print(f"\n{'s per epoch':<20}   train.py    compiled")
    for method in METHODS:
        for label, precision in PRECISIONS.items():
            both = [_epoch(method, precision, c, arguments) for c in _compiles(arguments)]
            cells = "  ".join(f"{each:10.2f}" for each in both)
            print(f"{method + ' ' + label:<20} {cells}", flush=True)
    if arguments.files:
        _start_up(arguments)


def _steps(method: str, precision: str, arguments: argparse.Namespace) -> list[float]:
    """Return the seconds of a step in the four ways."""
    data = RandomImages(BATCH_SIZE * arguments.steps, (3, 32, 32), **NORMALIZED)
    data.setup()
    by_hand = _by_hand(method, precision, data, arguments)
    ours = [_by_us(method, precision, data, c, arguments) for c in _compiles(arguments)]
    return [*by_hand, *ours]


def _compiles(arguments: argparse.Namespace) -> tuple[bool, bool]:
    """Return trainer.compile of the last two columns; torch.compile on a CPU takes minutes."""
    return False, arguments.device == "cuda"


def _by_hand(
    method: str, precision: str, data: RandomImages, arguments: argparse.Namespace
) -> tuple[float, float]:
    device = torch.device(arguments.device)
    config = configuration(method, "cifar10", f"net.width={arguments.width}")
    model = build(make_recipe(config, data.facts())).to(device).train()
    inputs = data.normalize(data.train.inputs[:BATCH_SIZE].to(device))
    targets = data.train.targets[:BATCH_SIZE].to(device)
    is_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam(model.trained_parameters(), lr=1e-3, fused=True, capturable=is_gpu)
    step = _Step(model, optimizer, inputs, targets, precision == "bf16-mixed")
    eager = _median(step, arguments.steps, is_gpu)
    if not is_gpu:
        return eager, 0.0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        step()
    return eager, _median(graph.replay, arguments.steps, is_gpu)


class _Step:
    """A step in a hand-written loop."""

    def __init__(
        self, model: Method, optimizer: Optimizer, inputs: Tensor, targets: Tensor, is_bf16: bool
    ) -> None:
        self.model, self.optimizer, self.inputs, self.targets = model, optimizer, inputs, targets
        self.autocast = torch.autocast(
            inputs.device.type, torch.bfloat16, is_bf16, cache_enabled=False
        )

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.model.loss_terms(self.inputs, self.targets)["loss"]
        torch.as_tensor(loss).backward()
        self.optimizer.step()


def _median(action: Callable[[], object], count: int, is_gpu: bool) -> float:
    """Return the median seconds of five rounds of actions, which run without waiting."""

    def several() -> None:
        for _ in range(max(1, count // 5)):
            action()
        if is_gpu:
            torch.cuda.synchronize()

    several()
    return statistics.median(seconds(several) for _ in range(5)) / max(1, count // 5)


def _by_us(
    method: str, precision: str, data: RandomImages, compiles: bool, arguments: argparse.Namespace
) -> float:
    """Return the seconds of a step of train.py, without validation."""
    clock = _train(method, precision, data, compiles, arguments)
    return statistics.median(clock.steps)


def _epoch(method: str, precision: str, compiles: bool, arguments: argparse.Namespace) -> float:
    """Return the seconds of an epoch of train.py, with validation and checkpoint."""
    share = {"validation_share": 0.1}
    data = RandomImages(arguments.num_images, (3, 32, 32), **NORMALIZED, **share)
    data.setup()
    clock = _train(method, precision, data, compiles, arguments)
    return statistics.median(clock.epochs[1:])


def _train(
    method: str, precision: str, data: RandomImages, compiles: bool, arguments: argparse.Namespace
) -> "_Clock":
    accelerator = "gpu" if arguments.device == "cuda" else "cpu"
    overrides = [f"trainer.accelerator={accelerator}", f"trainer.precision={precision}"]
    overrides += [f"net.width={arguments.width}"]
    overrides += [f"trainer.compile={str(compiles).lower()}", "trainer.progress_bar=false"]
    config = configuration(method, "cifar10", *overrides)
    config["trainer"]["max_epochs"] = arguments.epochs
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), "train")
        job.configure(config)
        model = build(make_recipe(config, data.facts()))
        fit(job, make_trainer(job, [], [clock], validate=data.val is not None), model, data)
    return clock


class _Clock(pl.Callback):
    """Times whole epochs, and the steps of an epoch after the first ones."""

    FIRST = 5  # steps

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.steps: list[float] = []
        self._first_steps: tuple[float, int] | None = None
        self._start = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = _now(pl_module)
        self.epochs.append(now - self._start)  # the first entry is the start
        self._start = now

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, _: Any, __: Any, index: int
    ) -> None:
        last = int(trainer.num_training_batches) - 1
        if index == min(self.FIRST, last - 1):
            self._first_steps = _now(pl_module), index
        elif index == last and self._first_steps and trainer.current_epoch > 0:
            start, first = self._first_steps
            self.steps.append((_now(pl_module) - start) / (last - first))


def _now(module: pl.LightningModule) -> float:
    """Return the time, after the device has finished."""
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _start_up(arguments: argparse.Namespace) -> None:
    """Print the seconds to the first step of train.py, which reads JPEG files, twice."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "images")
        _write_images(root, arguments.files)
        print(f"\ns to the first step, {arguments.files} JPEG files")
        for label in ("decoded", "kept pixels"):
            run = Path(folder, label.replace(" ", "_"))
            command = [sys.executable, str(ROOT / "train.py"), "task=cifar10", "method=pointwise"]
            command += ["task.source=folder", f"task.root={root}", "logger=none", "plots=false"]
            command += ["trainer.max_epochs=1", "trainer.limit_train_batches=2"]
            command += [f"net.width={arguments.width}", f"trainer.accelerator={arguments.device}"]
            command += [f"hydra.run.dir={run}"]
            subprocess.run(command, check=True, capture_output=True)
            metrics = json.loads((run / "metrics.json").read_text())
            print(f"{label:<20} {metrics['time/startup_seconds']:10.2f}", flush=True)


def _write_images(root: Path, count: int) -> None:
    """Write JPEG files of 32x32 pixels, in 10 classes; 500 different ones again and again."""
    from PIL import Image

    generator, contents = np.random.default_rng(0), []
    for _ in range(500):
        small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((32, 32)).save(file, "JPEG")
        contents.append(file.getvalue())
    for part, share in (("train", count * 5 // 6), ("test", count // 6)):
        for label in range(10):
            (root / part / str(label)).mkdir(parents=True)
        for index in range(share):
            (root / part / str(index % 10) / f"{index}.jpg").write_bytes(contents[index % 500])


if __name__ == "__main__":
    main()
