"""Compare the time of an epoch with that of a reference: python benchmarks/reference_epoch.py

The reference is the code of Ferianc et al. (2021), martinferianc/quantised-bayesian-nets on GitHub.
This script reimplements its training, so that both sides run in pairs on one machine with the same
torch. The reference loads single items through a DataLoader (images as PIL images through
ToTensor), uses the contiguous layout, writes out local reparametrization and KL, sets NaN gradients
to zero, uses the unfused Adam, and validates and writes a checkpoint after every epoch. Its metrics
at each step and its log are omitted, in its favour. An epoch of train.py follows its configuration:
validation, checkpoints, logging to metrics.csv. Rows are random, and as many as in the data set (a
tenth for MNIST).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from random_data import RandomImages, RandomTable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset
from torchvision.transforms.functional import to_pil_image, to_tensor
from train_step import configuration, machine, seconds

from bqnn.checkpoints.recipe import build, make_recipe
from bqnn.data import Rows, TensorData
from bqnn.jobs.job import Job
from bqnn.methods import METHODS, Method
from bqnn.optim import SGHMC
from bqnn.training.loggers import make_loggers
from bqnn.training.trainer import make_trainer

TABLES = {"yacht": (277, 6), "power": (8611, 4)}
NUM_IMAGES = 6000  # a tenth of MNIST, including validation rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["mnist", *TABLES])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of a run on a table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine(arguments.threads))
    print("\nseconds per epoch of train.py / of the reference, medians")
    for task in arguments.tasks:
        for method in arguments.methods:
            epochs = 1 if task == "mnist" else arguments.epochs
            pairs = [_pair(method, task, epochs) for _ in range(arguments.pairs + 1)][1:]
            ours, other = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"{task:<6} {method:<10} {ours:9.4f} / {other:9.4f} = {ratio:.2f}", flush=True)


def _pair(method: str, task: str, epochs: int) -> tuple[float, float]:
    """Return the seconds per epoch of both sides, which run one after the other."""
    config = configuration(method, task)
    # An ensemble collects members in the second half of the epochs.
    config["method"] |= {"burn_in": max(1, epochs // 2)} if method == "sghmc" else {}
    config["trainer"] |= {"max_epochs": epochs + 1, "progress_bar": False}
    share, batch_size = config["task"]["validation_share"], config["task"]["batch_size"]
    data: TensorData = (
        RandomImages(NUM_IMAGES, batch_size=batch_size, validation_share=share)
        if task == "mnist"
        # The batch size of the reference on tables, for both sides.
        else RandomTable(TABLES[task], batch_size=1000, validation_share=share)
    )
    data.setup()
    with tempfile.TemporaryDirectory() as folder:
        return _ours(config, data, Path(folder)), _reference(config, data, Path(folder), epochs)


def _ours(config: dict, data: TensorData, folder: Path) -> float:
    job = Job(folder, "benchmark")
    job.configure(config)
    model = build(make_recipe(config, data.facts()))
    clock = _EpochClock()
    make_trainer(job, make_loggers(job), [clock], validate=True).fit(model, datamodule=data)
    return clock.seconds_per_epoch()


class _EpochClock(pl.Callback):
    """Times the fit without its first epoch, which is the warm-up."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.start = time.perf_counter()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert trainer.max_epochs is not None
        self.elapsed = (time.perf_counter() - self.start) / (trainer.max_epochs - 1)

    def seconds_per_epoch(self) -> float:
        return self.elapsed


def _reference(config: dict, data: TensorData, folder: Path, epochs: int) -> float:
    model = build(make_recipe({**config, "method": _pointwise(config)}, data.facts()))
    name = config["method"]["name"]
    net = _reference_net(model.net.to(memory_format=torch.contiguous_format), name, config)
    optimizer: torch.optim.Optimizer
    if name == "sghmc":
        options = {k: v for k, v in config["method"]["optimizer"].items() if k != "name"}
        options["num_train"] = len(data.train)
        options["num_burn_in_steps"] = config["method"]["burn_in"] * len(data.train_dataloader())
        optimizer = SGHMC(net.parameters(), **options)
    else:
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    train = _loader(data.train, data)
    assert data.val is not None
    val = _loader(data.val, data)

    def epoch() -> None:
        net.train()
        for inputs, targets in train:
            _reference_step(net, model, optimizer, inputs, targets, len(data.train), name)
        net.eval()
        with torch.no_grad():
            for inputs, targets in val:
                model.likelihood.loss(net(inputs), targets)
        torch.save(net.state_dict(), folder / "weights.pt")

    epoch()

    def run() -> None:
        for _ in range(epochs):
            epoch()

    return seconds(run) / epochs


def _reference_step(
    net: nn.Module,
    model: Method,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    num_train: int,
    name: str,
) -> None:
    optimizer.zero_grad()
    loss = model.likelihood.loss(net(inputs), targets)
    kls = [module.kl() for module in net.modules() if isinstance(module, _Gaussian)]
    (loss + 0.1 * sum(kls) / num_train).backward()
    for param in net.parameters():
        if param.grad is not None:
            param.grad[param.grad != param.grad] = 0
    if name == "sghmc":
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1e20).item()
    optimizer.step()


class _Images(Dataset):
    """Converts each image through PIL and ToTensor, as torchvision's MNIST does."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = to_pil_image(self.rows.inputs[index])
        return to_tensor(image), int(self.rows.targets[index])


def _loader(rows: Rows, data: TensorData) -> DataLoader:
    is_images = rows.inputs.dim() == 4
    items: Dataset = _Images(rows) if is_images else TensorDataset(rows.inputs, rows.targets)
    sampler = SubsetRandomSampler(range(len(rows)))
    return DataLoader(items, batch_size=data.batch_size, sampler=sampler)


class _Gaussian(nn.Module):
    """A Bayesian layer without optimizations: softplus at each use, a new buffer for each term."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, prior_std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(layer.weight.detach().clone())
        self.rho = nn.Parameter(torch.full_like(self.mean, -5.0))
        self.bias = layer.bias
        self.prior_std = prior_std
        padding = layer.padding if isinstance(layer, nn.Conv2d) else 0
        self.apply_weight: Callable[..., Tensor] = (
            F.linear
            if isinstance(layer, nn.Linear)
            else lambda x, w: F.conv2d(x, w, None, 1, padding)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = self.apply_weight(x, self.mean)
            variance = self.apply_weight(x.pow(2), F.softplus(self.rho).pow(2))
            out = mean + torch.sqrt(1e-8 + variance) * torch.empty_like(mean).normal_()
        else:
            noise = torch.empty_like(self.mean).normal_()
            out = self.apply_weight(x, self.mean + noise * F.softplus(self.rho))
        return out if self.bias is None else out + self.bias

    def kl(self) -> Tensor:
        sigma, prior = F.softplus(self.rho), torch.full_like(self.rho, self.prior_std)
        ratio = (sigma / prior).pow(2)
        return 0.5 * (ratio + (self.mean / prior).pow(2) - 1 - ratio.log()).sum()


class _Dropout(nn.Module):
    """Dropout with one mask per row, which drops whole channels of images."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:2] + (1,) * (x.dim() - 2)
        mask = torch.bernoulli(torch.full(shape, 1 - self.rate)) / (1 - self.rate)
        return x * mask


def _pointwise(config: dict) -> dict:
    """Return the configuration of the pointwise method, whose layers are then replaced."""
    return configuration("pointwise", config["task"]["name"])["method"]


def _reference_net(net: nn.Module, name: str, config: dict) -> nn.Module:
    from bqnn.layers.markers import DropoutSite

    for path, module in list(net.named_modules()):
        if name == "bbb" and isinstance(module, nn.Linear | nn.Conv2d):
            net.set_submodule(path, _Gaussian(module, config["method"]["prior_std"]))
        if name == "mcdropout" and isinstance(module, DropoutSite):
            net.set_submodule(path, _Dropout(config["method"]["rate"]))
    return net


if __name__ == "__main__":
    main()
