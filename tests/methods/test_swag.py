"""SWAG has the moments of the networks that a training has passed."""

import logging
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from bqnn.layers.bayes import held_means
from bqnn.layers.draws import make_draw
from bqnn.methods import SWAG, Method
from bqnn.methods.swag import Moments
from bqnn.nets import ResNet
from tests.bare_trainer import bare_trainer
from tests.small_methods import image_method, images, table, table_method

SGD = {"name": "sgd", "lr": 0.1}


def fitted(method: Method, epochs: int, rows: Any = None, **options: Any) -> SWAG:
    fit = bare_trainer(epochs, num_sanity_val_steps=0, inference_mode=False, **options)
    fit.fit(method, table() if rows is None else rows)
    assert isinstance(method, SWAG)
    return method


class Passed(pl.Callback):
    """Records the parameters at the ends of epochs."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, param in pl_module.net.named_parameters():
            if param.requires_grad:
                self.seen.setdefault(name, []).append(param.detach().clone())


@pytest.mark.parametrize(
    ("options", "collected"),
    [
        ({"swa_start": 0.0}, slice(0, 8)),
        ({"swa_start": 0.5}, slice(4, 8)),
        ({"swa_start": 0.3, "collect_every": 3, "scale": 4.0}, slice(4, 8, 3)),  # after 2 of 8
    ],
)
def test_mean_and_variance_are_those_of_the_passed_networks(
    options: dict[str, Any], collected: slice
) -> None:
    passed = Passed()
    method = fitted(table_method("swag", optimizer=SGD, **options), 8, callbacks=[passed])
    layers = method.gaussian_weights()
    for name, values in passed.seen.items():
        mean = torch.stack(values)[collected].mean(0)
        torch.testing.assert_close(method.net.get_parameter(name), mean)
        layer = layers.get(name.removesuffix(".mean"))
        if layer is not None and name.endswith(".mean"):
            std = torch.stack(values)[collected].std(0, correction=0) * method.scale**0.5
            least = 1e-3 * std.square().mean().sqrt()
            torch.testing.assert_close(layer.sigma, std.clamp_min(least), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.1, 0.055, 0.01, 0.01]),  # 0.01 + 0.09 (1 + cos(pi t / 2)) / 2
        ("constant", [0.1, 0.1, 0.01, 0.01]),
        ("cosine_by_step", [0.1, 0.055, 0.01, 0.01]),
    ],
)
def test_the_rate_leads_to_that_of_the_collection(schedule: str, expected: list[float]) -> None:
    passed = Passed()
    options = {"swa_start": 0.5, "swa_lr": 0.01, "schedule": schedule}
    fitted(table_method("swag", optimizer=SGD, **options), 4, callbacks=[passed])
    assert passed.rates == pytest.approx(expected)


@pytest.mark.parametrize("epochs", [6, 3])  # more networks than the rank, and fewer
def test_draws_of_a_rank_have_the_covariance_of_the_paper(epochs: int) -> None:
    passed = Passed()
    options: dict[str, Any] = {"optimizer": {"name": "sgd", "lr": 0.3}, "scale": 4.0, "rank": 4}
    method = fitted(table_method("swag", **options), epochs, callbacks=[passed]).eval()
    names = [f"{name}.mean" for name in method.gaussian_weights()]
    seen = torch.stack(
        [torch.cat([passed.seen[n][t].flatten() for n in names]) for t in range(epochs)]
    ).double()
    running = seen.cumsum(0) / torch.arange(1, epochs + 1)[:, None]
    columns = (seen - running)[-4:]
    expected = columns.T @ columns / (2 * (len(columns) - 1))
    expected += seen.var(0, correction=0).diag() / 2

    draws = []
    for index in range(4000):
        generator = torch.Generator().manual_seed(index)
        made = make_draw(method.net, 0, generator)
        draws.append(
            torch.cat([made[each].flatten() for each in method.gaussian_weights().values()])
        )
    found = torch.stack(draws).double().T.cov()
    spread = expected.diag().sqrt()
    spread[spread < 0.01 * spread.max()] = torch.inf  # those of dead units, which did not move
    difference = (found / method.scale - expected) / spread[:, None] / spread
    assert difference.abs().max() < 0.1  # correlations; 5 standard errors are 0.08
    first = next(iter(method.gaussian_weights().values())).mean.numel()
    between = expected / spread[:, None] / spread
    assert between[:first, first:].abs().max() > 0.3  # of different layers


def test_moments_do_not_cancel() -> None:
    moments, values = Moments(), 1000 + 1e-2 * torch.randn(20, 5, generator=torch.Generator())
    for value in values:
        moments.add({"a": value})
    torch.testing.assert_close(
        moments.variance("a"), values.double().var(0, correction=0).float(), rtol=0.02, atol=0
    )


@pytest.mark.parametrize(("swa_start", "collected"), [(0.5, 1), (0.0, 0)])
def test_too_few_networks_are_said(
    swa_start: float, collected: int, caplog: pytest.LogCaptureFixture
) -> None:
    every = 1 if collected else 3
    method = table_method("swag", swa_start=swa_start, collect_every=every)
    with caplog.at_level(logging.WARNING, "bqnn.methods.swag"):
        fitted(method, 2)
    assert f"swag has collected {collected} of the networks" in caplog.text
    draws = method.eval().predictive(table().inputs)
    torch.testing.assert_close(draws, draws[:1].expand_as(draws))


def test_statistics_of_batch_norm_are_those_of_the_mean_and_its_draws() -> None:
    method = fitted(image_method("swag", resnet(), scale=1e-12), 4, images())  # hardly any noise
    first = method.net.get_submodule("stem.2")
    assert isinstance(first, nn.BatchNorm2d)
    convolution = method.net.get_submodule("stem.1")
    with torch.no_grad(), held_means(method.net):
        outputs = [convolution(inputs) for inputs, _ in images()]
    means = torch.stack([x.mean((0, 2, 3)) for x in outputs]).mean(0)
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in outputs]).mean(0)
    torch.testing.assert_close(first.running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.running_var, variances, rtol=1e-4, atol=1e-5)
    assert first.momentum == 0.1
    noisy = fitted(image_method("swag", resnet(), scale=1e4), 4, images())
    wide = noisy.net.get_submodule("stem.2")
    assert isinstance(wide, nn.BatchNorm2d)
    assert wide.running_var is not None
    assert (wide.running_var > 2 * variances).any()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet([1, 8, 8], [3], width=2, blocks_per_stage=[1])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"swa_lr": 0}, r"^swa_lr=0: a learning rate above 0"),
        ({"swa_start": 1}, r"^swa_start=1: the share of the epochs"),
        ({"collect_every": 0}, r"^collect_every=0: in epochs, 1 or more"),
        ({"scale": -1}, r"^scale=-1: a factor of the variances"),
        ({"rank": -1}, r"^rank=-1: the rank of the covariance, 2 or more, or 0"),
        ({"rank": 1}, r"^rank=1: .* one deviation has no covariance"),
    ],
)
def test_invalid_options_are_refused(option: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        table_method("swag", **option)
