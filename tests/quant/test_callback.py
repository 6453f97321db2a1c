"""QuantizationCallback in a Trainer and a module of another program."""

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bqnn.layers.markers import Enter, Leave
from bqnn.quant.callback import QuantizationCallback, calibrate_module
from bqnn.quant.engines import measure
from bqnn.quant.fake_quant import FakeQuant
from bqnn.quant.integer import convert
from bqnn.quant.simulated import SimulatedLayer, is_prepared
from bqnn.quant.spec import QuantSpec
from tests.bare_trainer import bare_trainer


class Classifier(pl.LightningModule):
    """A module as a user could write it, without a recipe."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            Enter(),
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 16, 3),
            Leave(),
        )

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        loss = self._loss(batch)
        assert loss.isfinite()  # in Lightning's sanity check, too
        self.log("val", loss)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("test", self._loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum((1, 2, 3)) > 0).long()), batch_size=32)


def trainer(folder: Path, max_epochs: int, **options: object) -> pl.Trainer:
    callback = QuantizationCallback(QuantSpec(weight_bits=4), freeze_epochs=1)
    return bare_trainer(max_epochs, callbacks=[callback], default_root_dir=folder, **options)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def test_each_epoch_renews_least_squares_ranges_until_they_are_frozen(tmp_path: Path) -> None:
    scales: list[tuple[int, float]] = []

    class Scales(pl.Callback):
        def on_train_batch_end(self, fit: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            scales.append((fit.current_epoch, float(module.net[1].output_quant.scale)))

    spec = QuantSpec(activation_bits=3, activation_observer="histogram")
    callbacks = [QuantizationCallback(spec, freeze_epochs=1), Scales()]
    bare_trainer(3, callbacks=callbacks, default_root_dir=tmp_path).fit(Classifier(), data())
    of_epoch = [{scale for number, scale in scales if number == epoch} for epoch in range(3)]
    assert [len(each) for each in of_epoch] == [1, 1, 1]
    assert of_epoch[0] != of_epoch[1] == of_epoch[2]


def test_it_trains_and_a_fresh_process_can_test_what_was_saved(tmp_path: Path) -> None:
    module, fit = Classifier(), trainer(tmp_path, 3)
    before = copy.deepcopy(module.net)
    fit.fit(module, data(), data())
    assert is_prepared(module.net)
    assert not torch.equal(before[1].weight, module.net[1].weight)
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    expected = fit.test(module, data(), verbose=False)

    fresh = Classifier()  # and a Trainer that never fits
    tested = trainer(tmp_path, 3).test(
        fresh, data(), ckpt_path=str(tmp_path / "saved.ckpt"), verbose=False
    )
    assert tested == expected
    assert same_state(module, fresh)

    x = data().dataset[:][0]
    with torch.no_grad():
        simulated = module.net.eval()(x)
        assert torch.equal(convert(module.net, "fbgemm")(x), simulated)


def test_a_second_fit_goes_on_with_the_same_network(tmp_path: Path) -> None:
    module = Classifier()
    trainer(tmp_path, 2).fit(module, data(), data())
    layers = [m for m in module.net.modules() if isinstance(m, SimulatedLayer)]
    trainer(tmp_path, 2).fit(module, data(), data())
    assert [m for m in module.net.modules() if isinstance(m, SimulatedLayer)] == layers
    assert len(layers) == 2


def test_a_resumed_fit_ends_bit_equal(tmp_path: Path) -> None:
    whole, half, resumed = Classifier(), Classifier(), Classifier()
    trainer(tmp_path, 4).fit(whole, data())
    stopped = trainer(tmp_path, 4)
    stopped.callbacks.append(_StopAfter(2))  # type: ignore[attr-defined]
    stopped.fit(half, data())
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, 4).fit(resumed, data(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert same_state(whole, resumed)


class _StopAfter(pl.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def test_held_out_rows_set_no_range(tmp_path: Path) -> None:
    with_val, without = Classifier(), Classifier()
    x, y = data().dataset[:]
    wild = DataLoader(TensorDataset(100 * x, y), batch_size=32)
    trainer(tmp_path, 2).fit(with_val, data(), wild)
    trainer(tmp_path, 2).test(with_val, wild, verbose=False)
    trainer(tmp_path, 2).fit(without, data())
    assert same_state(with_val, without)


@pytest.mark.parametrize(("max_epochs", "frozen_at"), [(1, [False]), (3, [False, False, True])])
def test_ranges_are_frozen_in_the_last_epochs_but_never_in_the_only_one(
    max_epochs: int, frozen_at: list[bool], tmp_path: Path
) -> None:
    module, seen = Classifier(), []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            quants = [m for m in module.net.modules() if isinstance(m, FakeQuant)]
            seen.append(all(quant.frozen for quant in quants))

    fit = trainer(tmp_path, max_epochs)
    fit.callbacks.append(Look())  # type: ignore[attr-defined]
    fit.fit(module, data())
    assert seen == frozen_at


def test_training_without_a_last_epoch_freezes_nothing(tmp_path: Path) -> None:
    module = Classifier()
    trainer(tmp_path, -1, max_steps=9).fit(module, data())
    assert not any(m.frozen for m in module.net.modules() if isinstance(m, FakeQuant))


def test_calibrating_needs_data_and_a_network_in_reach() -> None:
    class Nothing:
        def train_dataloader(self) -> list:
            return []

        def normalize(self, inputs: Tensor) -> Tensor:
            return inputs

    with pytest.raises(ValueError, match="has seen no data"):
        calibrate_module(Classifier(), QuantSpec(), Nothing(), 1)
    with pytest.raises(TypeError, match="has no attribute `net`"):
        calibrate_module(pl.LightningModule(), QuantSpec(), Nothing(), 1)


def test_a_network_in_eval_mode_is_put_in_train_mode(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Classifier()
    module.net.eval()
    before = module.net[2].running_mean.clone()
    trainer(tmp_path, 1).fit(module, data(), data())
    assert "was in evaluation mode" in caplog.text
    convert(module.net, "fbgemm")  # every range was seen
    trained = Classifier()
    trainer(tmp_path, 1).fit(trained, data())
    assert not torch.equal(before, trained.net[1].bn.running_mean)


def test_parts_in_eval_mode_stay_so_and_still_get_ranges(tmp_path: Path) -> None:
    class Frozen(Classifier):
        def on_train_epoch_start(self) -> None:
            self.net[1].eval()  # whose batch norm is to keep its statistics

    module = Frozen()
    before = module.net[2].running_mean.clone()
    trainer(tmp_path, 2).fit(module, data(), data())
    assert torch.equal(module.net[1].bn.running_mean, before)
    convert(module.net, "fbgemm")


def test_bits_that_would_saturate_are_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measure, "has_vnni", lambda: False)
    module = Classifier()
    callback = QuantizationCallback(QuantSpec(activation_bits=8))
    bare_trainer(1, callbacks=[callback], default_root_dir=tmp_path).fit(module, data())
    assert "run on the engine reference" in caplog.text
    (x,) = next(iter(data()))[:1]
    simulated = module.eval().net(x).detach()
    with torch.no_grad():
        assert torch.equal(convert(module.net)(x), module.net(x))
    assert simulated.shape[0] == len(x)


def test_half_precision_is_refused(tmp_path: Path) -> None:
    for precision in ("bf16-mixed", "64-true"):
        with pytest.raises(ValueError, match="choose 32-true"):
            trainer(tmp_path, 1, precision=precision).fit(Classifier(), data())
