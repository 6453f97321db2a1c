"""Compare the time of training steps: python benchmarks/train_step.py

The script makes four comparisons. The two sides of each are timed in pairs within one run, so that
noise of the machine affects both, and the result is the median of the ratios:

1. an epoch of train.py (data, Lightning, forward, backward, optimizer; no validation, no
   checkpoint) against the same steps in a hand-written loop over the same tensors;
2. a step of each method against a pointwise step, LeNet at batch 256;
3. a step of quantization-aware training against a float step of the same method (for an ensemble,
   the step of one member against the step of the sampler), LeNet at batch 256;
4. `python train.py task=digits` from its start to the first step, against importing Lightning.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from random_data import RandomImages, RandomTable
from torch import Tensor

from bqnn.checkpoints.recipe import build, make_recipe
from bqnn.data import TensorData, TensorLoader
from bqnn.jobs.command_line.configuration import plain
from bqnn.jobs.job import Job
from bqnn.jobs.provenance import versions
from bqnn.methods import METHODS, MemberTuning, Method
from bqnn.optim import make_optimizer
from bqnn.quant.callback import quantize_module
from bqnn.quant.spec import QuantSpec
from bqnn.settings.conf import CONF
from bqnn.training.process import keep_freed_memory
from bqnn.training.trainer import make_trainer

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=15, help="pairs per comparison")
    parser.add_argument("--only", type=int, choices=(1, 2, 3, 4), help="run only this comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the command line does
    print(machine(arguments.threads))

    comparisons = (_path_and_hand, _methods, _quantized, _start)
    for number, compare in enumerate(comparisons, start=1):
        if arguments.only in (None, number):
            compare(arguments.pairs)


def _path_and_hand(num_pairs: int) -> None:
    print("\n1. an epoch of train.py / of a hand-written loop, medians")
    for label, task, data in (
        ("MNIST LeNet, batch 256", "mnist", RandomImages(256 * 20, batch_size=256)),
        ("yacht MLP, one step an epoch", "yacht", RandomTable((277, 6), batch_size=1000)),
    ):
        data.setup()
        for method in METHODS:
            ours, by_hand = _lightning_and_hand(method, task, data, num_pairs)
            _print_pairs(f"{method:<10} {label}", ours, by_hand)


def _methods(num_pairs: int) -> None:
    print("\n2. method / pointwise, LeNet, batch 256, one hand-written step, medians")
    times = _interleaved({method: _hand_step(method) for method in METHODS}, num_pairs)
    for method in METHODS:
        _print_pairs(f"{method:<10}", times[method], times["pointwise"])


def _quantized(num_pairs: int) -> None:
    print("\n3. quantization-aware / float, LeNet, batch 256, one hand-written step, medians")
    for method in METHODS:
        steps = {"qat": _quantized_step(method), "float": _hand_step(method)}
        times = _interleaved(steps, num_pairs)
        _print_pairs(f"{method:<10}", times["qat"], times["float"])


def _start(_: int) -> None:
    print("\n4. from the start of the process to the first step of train.py task=digits")
    pairs = [(_first_step(), seconds(_import_lightning)) for _ in range(3)]
    ours, imports = map(list, zip(*pairs, strict=True))
    _print_pairs("train.py / import pytorch_lightning", ours, imports)


def _interleaved(steps: dict[str, Callable[[], None]], num_pairs: int) -> dict[str, list[float]]:
    """Return the seconds of each step. The steps take turns, after three rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(num_pairs + 3):
        for name, step in steps.items():
            elapsed = seconds(step)
            if round_ >= 3:
                times[name].append(elapsed)
    return times


def _lightning_and_hand(
    method: str, task: str, data: TensorData, pairs: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of epochs through Lightning, and of the same steps by hand after each."""
    overrides = ["method.prior=marginal_likelihood"] if method == "laplace" else []
    config = configuration(method, task, "trainer.save_every=1e9", *overrides)
    config["trainer"]["max_epochs"] = pairs + 3
    model, twin = (build(make_recipe(config, data.facts())) for _ in range(2))
    by_hand = _HandEpochs(twin, data)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), "benchmark")
        job.configure(config)
        make_trainer(job, [], [by_hand], validate=False).fit(model, datamodule=data)
    return by_hand.lightning_seconds[3:], by_hand.hand_seconds[3:]


class _HandEpochs(pl.Callback):
    """Times each epoch of the Trainer, then runs and times its steps by hand."""

    def __init__(self, model: Method, data: TensorData) -> None:
        self.model, self.data = model.train(), data
        self.optimizer = _optimizer(model, steps_per_epoch=len(data.train_dataloader()))
        self.loader: TensorLoader = data.train_dataloader()
        self.lightning_seconds: list[float] = []
        self.hand_seconds: list[float] = []
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.lightning_seconds.append(time.perf_counter() - self._start)
        self.hand_seconds.append(seconds(self._epoch))
        self._start = time.perf_counter()

    def _epoch(self) -> None:
        for inputs, targets in self.loader:
            _step(self.model, self.optimizer, self.data.normalize(inputs), targets)


def _step(model: Method, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> None:
    optimizer.zero_grad()
    torch.as_tensor(model.loss_terms(inputs, targets)["loss"]).backward()
    optimizer.step()


def _hand_step(method: str) -> Callable[[], None]:
    data = RandomImages(256, batch_size=256)
    data.setup()
    model = build(make_recipe(configuration(method, "mnist"), data.facts())).train()
    optimizer = _optimizer(model, steps_per_epoch=20)
    inputs, targets = data.normalize(data.train.inputs[:256]), data.train.targets[:256]
    return lambda: _step(model, optimizer, inputs, targets)


def _quantized_step(method: str) -> Callable[[], None]:
    data = RandomImages(256, batch_size=256)
    data.setup()
    model = build(make_recipe(configuration(method, "mnist"), data.facts()))
    model = model.fine_tuning({"name": "adam", "lr": 5e-4}, prior_weight=1.0)
    quantize_module(model, QuantSpec())
    optimizer = make_optimizer(model.train().trained_parameters(), **model.optimizer)
    inputs, targets = data.normalize(data.train.inputs[:256]), data.train.targets[:256]
    if not isinstance(model, MemberTuning):
        return lambda: _step(model, optimizer, inputs, targets)

    def step() -> None:
        optimizer.zero_grad()
        torch.as_tensor(model.member_terms(0, inputs, targets)["loss"]).backward()
        optimizer.step()

    return step


def _optimizer(model: Method, steps_per_epoch: int) -> torch.optim.Optimizer:
    return make_optimizer(model.trained_parameters(), **model.optimizer_options(steps_per_epoch))


def configuration(method: str, task: str, *overrides: str) -> dict[str, Any]:
    arguments = [f"method={method}", f"task={task}", "logger=none", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain(compose("train", arguments))


def _first_step() -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), "task=digits", "logger=none"]
        command += ["trainer=smoke", "plots=false", f"hydra.run.dir={folder}"]
        subprocess.run(command, check=True, capture_output=True)
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
        return float(metrics["time/startup_seconds"])


def _import_lightning() -> None:
    subprocess.run([sys.executable, "-c", "import pytorch_lightning"], check=True)


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _print_pairs(label: str, ours: list[float], theirs: list[float]) -> None:
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    a, b = statistics.median(ours) * 1e3, statistics.median(theirs) * 1e3
    print(f"{label:<45} {a:9.2f} ms / {b:9.2f} ms = {ratio:.2f}")


def machine(threads: int) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    cpu = " ".join(flag for flag in flags if flag.startswith(("avx", "amx", "fma")))
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"threads {threads}, float32, channels_last, capability "
        f"{torch.backends.cpu.get_cpu_capability()}\nCPU: {model or platform.processor()}, "
        f"{os.cpu_count()} cores, {'with' if torch.cpu._is_vnni_supported() else 'without'} VNNI\n"
        f"CPU flags: {cpu or 'unknown'}\n{packages}"
    )


if __name__ == "__main__":
    main()
