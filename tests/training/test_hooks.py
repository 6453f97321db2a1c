"""Hooks that do nothing are not called, and the others still are."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import RunningStage
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bqnn.training.hooks import HOOKS, SkipIdleHooks, Trainer


class Module(pl.LightningModule):
    """A line that records the calls of two hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.calls: list[str] = []
        self.fails = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.hooks = {name: getattr(self, name) for name in HOOKS}
        self.clips = self.configure_gradient_clipping
        if self.fails:
            raise RuntimeError("stopped")
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_after_backward(self) -> None:
        self.calls.append("on_after_backward")


class Recorder(pl.Callback):
    """Records the gradients before each step."""

    def __init__(self) -> None:
        self.gradients: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.gradients.append(pl_module.layer.weight.grad.item())


def _trainer(*callbacks: pl.Callback, **options: float) -> Trainer:
    return Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def _fit(*callbacks: pl.Callback, **options: float) -> Module:
    torch.manual_seed(0)
    module = Module()
    _trainer(*callbacks, **options).fit(module, DataLoader(TensorDataset(torch.ones(2, 1))))
    return module


def test_idle_hooks_are_none_in_a_training_and_back_afterwards():
    module = _fit(SkipIdleHooks())
    called = {name for name, hook in module.hooks.items() if hook is not None}
    assert called == {"on_after_backward"}
    assert len(module.calls) == 4
    assert module.clips is None
    assert not {*HOOKS, "configure_gradient_clipping", "optimizer_zero_grad"} & vars(module).keys()


def test_hooks_are_back_after_an_error() -> None:
    module = Module()
    module.fails = True
    with pytest.raises(RuntimeError, match="stopped"):
        _trainer(SkipIdleHooks()).fit(module, DataLoader(TensorDataset(torch.ones(2, 1))))
    assert module.clips is None
    assert not {*HOOKS, "configure_gradient_clipping", "optimizer_zero_grad"} & vars(module).keys()


def test_a_training_is_the_same_without_idle_hooks():
    with_hooks, without = Recorder(), Recorder()
    states = [
        _fit(with_hooks).state_dict(),
        _fit(SkipIdleHooks(), without).state_dict(),
    ]
    assert with_hooks.gradients == without.gradients
    assert len(without.gradients) == 4
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])


def test_gradients_are_clipped_on_request():
    module = _fit(SkipIdleHooks(), gradient_clip_val=1e-6)
    assert module.clips is not None
    torch.manual_seed(0)
    assert torch.allclose(module.layer.weight, Module().layer.weight, atol=1e-5)


def test_the_trainer_knows_its_stage():
    trainer = Trainer(accelerator="cpu", logger=False)
    assert not trainer.training
    trainer.training = True
    assert trainer.training
    assert trainer.state.stage == RunningStage.TRAINING
    trainer.validating = True
    assert not trainer.training
