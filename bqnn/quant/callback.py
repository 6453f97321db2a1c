"""QuantizationCallback: quantization-aware training in any Lightning Trainer."""

import logging
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from bqnn.arguments import ArgumentError, prefixed, whole_number
from bqnn.layers.noise import reseed
from bqnn.layers.safe_convolutions import guard_backward
from bqnn.quant.fbgemm import FakeQuant
from bqnn.quant.fuse import fuse
from bqnn.quant.saturation import refuse_saturation
from bqnn.quant.simulated import calibrate, enable, freeze, is_prepared, prepare
from bqnn.quant.spec import QuantSpec
from bqnn.seeds import Stream, stream_seed

log = logging.getLogger(__name__)


class Data(Protocol):
    """Protocol of data modules: batches of inputs and targets, and their normalization."""

    def train_dataloader(self) -> Iterable[tuple[Tensor, Tensor]]: ...

    def normalize(self, inputs: Tensor) -> Tensor: ...


class QuantizationCallback(pl.Callback):
    """Replaces the layers of `pl_module.net` by fake-quantized ones, before optimizers exist.

    In the last `freeze_epochs` epochs of a fit (but never in its only one) ranges and batch norm's
    statistics stay as they are. The network stays fake-quantized: `bqnn.quant.integer.convert`,
    or `bqnn.checkpoints.recipe.load(path, numeric="int8")`, makes integers of it. A module that
    keeps a recipe, as bqnn's do, has the spec written there, so that its checkpoints describe
    themselves.
    """

    def __init__(self, spec: QuantSpec, freeze_epochs: int = 2) -> None:
        freeze_epochs = whole_number("freeze_epochs", freeze_epochs, "0 or more", 0)
        if spec.activation_observer == "histogram":
            raise ArgumentError(
                "activation_observer=histogram only calibrates; train with moving_average or "
                "minmax",
                "activation_observer",
            )
        self.spec = spec
        self.freeze_epochs = freeze_epochs

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Before optimizers exist and before a checkpoint is restored, whatever stage comes first.
        if trainer.precision != "32-true":
            raise ArgumentError(
                f"precision={trainer.precision}: fake quantization needs 32-true, in which its "
                "ranges and the integers' scales are",
                "precision",
            )
        guard_backward()
        quantize_module(pl_module, self.spec)
        if stage == "fit":
            refuse_saturation(_net(pl_module))

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        enable(_net(pl_module), False)  # before any batch was seen there are no ranges

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        enable(_net(pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        net = _net(pl_module)
        if not net.training:  # Lightning leaves it as it is
            log.warning(
                "the network was in eval mode; QuantizationCallback trains it in train mode"
            )
            net.train()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            # Parts may be in eval mode on purpose; their ranges need data all the same.
            for module in _net(pl_module).modules():
                if isinstance(module, FakeQuant):
                    module.train()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs = trainer.max_epochs
        if epochs is None or epochs < 0:  # no last epoch is known
            is_last = False
        else:
            is_last = trainer.current_epoch >= epochs - min(self.freeze_epochs, epochs - 1)
        freeze(_net(pl_module), is_last)


def quantization_callbacks(options: Mapping[str, Any]) -> list[pl.Callback]:
    """Return the callback for the group `quant` of a configuration, or an empty list.

    Raises:
        ValueError: In one line, with the key of the configuration.
    """
    if options["name"] == "none":
        return []
    spec = QuantSpec.from_config(options)
    with prefixed("quant"):
        if options["mode"] != "qat":
            raise ArgumentError(
                f"mode={options['mode']}: a training is quantization-aware (qat); calibrate the "
                "trained network with quantize.py",
                "mode",
            )
        return [QuantizationCallback(spec, options["freeze_epochs"])]


def fine_tuning_optimizer(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the fine-tuning optimizer, with a default for the learning rate.

    A weight has to cross half a step to become another integer, so the rate is proportional to the
    step: twice as much for each bit less.
    """
    tuning = options["fine_tuning"]
    rate = tuning["lr_at_8_bits"] * 2 ** (8 - options["weight_bits"])
    return {
        name: rate if name == "lr" and value is None else value
        for name, value in tuning["optimizer"].items()
    }


def calibrate_module(
    model: pl.LightningModule, spec: QuantSpec, data: Data, num_batches: int
) -> None:
    """Quantize `model.net` without training, with ranges from batches of the training rows."""
    num_batches = whole_number("num_batches", num_batches, "1 or more", 1)
    quantize_module(model, spec, stage="ptq")
    refuse_saturation(_net(model))
    batches = islice(data.train_dataloader(), num_batches)
    # Stochastic layers are drawn on the way.
    reseed(torch.device("cpu"), stream_seed(0, Stream.CALIBRATION))
    calibrate(_net(model), (data.normalize(inputs) for inputs, _ in batches))


def quantize_module(pl_module: pl.LightningModule, spec: QuantSpec, stage: str = "qat") -> None:
    """Fuse and prepare `pl_module.net` if it is not prepared yet, and record its spec.

    stage: `qat` where it is trained next, `ptq` where it is calibrated.
    """
    net = _net(pl_module)
    if not is_prepared(net):
        prepare(fuse(net), spec)
    recipe: dict[str, Any] | None = getattr(pl_module, "recipe", None)
    if recipe is not None:
        pl_module.recipe = {  # type: ignore[assignment]
            **recipe,
            "stage": stage,
            "quant": spec.to_dict(),
        }


def _net(pl_module: pl.LightningModule) -> nn.Module:
    net = getattr(pl_module, "net", None)
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"{type(pl_module).__name__} has no network under the name `net`; that is what is "
            "quantized"
        )
    return net
