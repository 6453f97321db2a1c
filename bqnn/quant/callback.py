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
from bqnn.quant.fake_quant import FakeQuant
from bqnn.quant.fuse import fuse
from bqnn.quant.mark import Keep, entries, mark
from bqnn.quant.reconstruction import calibrate_by
from bqnn.quant.simulated import enable, freeze, is_prepared, prepare, renew
from bqnn.quant.spec import QuantSpec
from bqnn.quant.stochastic import check_rounding
from bqnn.seeds import Stream, stream_seed

log = logging.getLogger(__name__)


class Data(Protocol):
    """Protocol of data modules that `calibrate_module` can use."""

    def train_dataloader(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Return batches of inputs [B, ...] and targets [B]."""
        ...

    def normalize(self, inputs: Tensor) -> Tensor:
        """Normalize inputs for the network."""
        ...


class QuantizationCallback(pl.Callback):
    """Quantization-aware training: fake-quantizes the layers of `pl_module.net` before a fit.

    The layers are replaced in `setup`, before the optimizers are created. The network stays
    fake-quantized after the fit. To get integers, call `bqnn.quant.integer.convert`, or load the
    checkpoint with `bqnn.checkpoints.recipe.load(path, numeric="int8")`. If the module has a
    `recipe`, the callback records the spec in it, so that checkpoints describe themselves.

    Args:
        spec: Bit widths and ranges.
        freeze_epochs: In this many last epochs of a fit, ranges and batch norm statistics stay
            fixed. The only epoch of a fit is never frozen.
        keep: Types of modules, and globs over the names of modules, that stay in float, in addition
            to those of the spec. A checkpoint with a recipe records only the spec.
        rounds: False trains without rounding, otherwise alike: the control of a quantization-aware
            training.

    Raises:
        ValueError: An option of the spec supports only calibration, or `freeze_epochs` is below 0.

    Examples:
        >>> callback = QuantizationCallback(QuantSpec(weight_bits=4), freeze_epochs=1)
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        spec: QuantSpec,
        freeze_epochs: int = 2,
        *,
        keep: Keep = (),
        rounds: bool = True,
    ) -> None:
        freeze_epochs = whole_number("freeze_epochs", freeze_epochs, "0 or more", 0)
        spec.check_trainable()
        self.spec = spec
        self.freeze_epochs = freeze_epochs
        self.keep = keep
        self.rounds = rounds

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning calls this before it creates optimizers or restores a checkpoint.
        if trainer.precision != "32-true":
            raise ArgumentError(
                f"precision={trainer.precision}: ranges and scales of fake quantization are "
                "float32; choose 32-true",
                "precision",
            )
        guard_backward()
        check_rounding(_net(pl_module), self.spec)
        quantize_module(pl_module, self.spec, keep=self.keep)
        enable(_net(pl_module), self.rounds)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        enable(_net(pl_module), False)  # there are no ranges before the first batch

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        enable(_net(pl_module), self.rounds)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        net = _net(pl_module)
        if not net.training:  # Lightning does not change the mode
            log.warning(
                "the network was in evaluation mode; QuantizationCallback sets it to training mode"
            )
            net.train()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            # A part that the user keeps in eval mode still needs ranges.
            for module in _net(pl_module).modules():
                if isinstance(module, FakeQuant):
                    module.train()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs = trainer.max_epochs
        if epochs is None or epochs < 0:  # the number of epochs is unlimited
            is_last = False
        else:
            is_last = trainer.current_epoch >= epochs - min(self.freeze_epochs, epochs - 1)
        freeze(_net(pl_module), is_last)
        renew(_net(pl_module))


def quantization_callbacks(options: Mapping[str, Any], rounds: bool = True) -> list[pl.Callback]:
    """Create the callbacks for the group `quant` of a configuration.

    Args:
        options: The group; `name=none` turns quantization off.
        rounds: False for a control, which trains without rounding.

    Returns:
        A list with the callback, or an empty list.

    Raises:
        ValueError: An option is invalid. The message names its key.

    Examples:
        >>> quantization_callbacks({"name": "none"})
        []
    """
    if options["name"] == "none":
        return []
    spec = QuantSpec.from_config(options)
    with prefixed("quant"):
        if options["mode"] != "qat":
            raise ArgumentError(
                f"mode={options['mode']}: training supports only qat (quantization-aware "
                "training); to calibrate a trained network, quantize its checkpoint",
                "mode",
            )
        return [QuantizationCallback(spec, options["freeze_epochs"], rounds=rounds)]


def fine_tuning_optimizer(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the fine-tuning optimizer, with a default for the learning rate.

    A weight must move by half a step of its grid to change its integer. The default learning rate
    is therefore proportional to the step, 1 / (2^bits - 1), which doubles with every bit less.
    Coarse activations need fast weights, too: b bits of the unsigned activations count as b + 1.

    Args:
        options: The group `quant` of a configuration.

    Examples:
        >>> tuning = {"lr_at_8_bits": 3e-5, "optimizer": {"name": "adam", "lr": None}}
        >>> bits = {"weight_bits": 4, "activation_bits": 7}
        >>> fine_tuning_optimizer({"fine_tuning": tuning, **bits})
        {'name': 'adam', 'lr': 0.00051}
    """
    tuning = options["fine_tuning"]
    bits = min(options["weight_bits"], options["activation_bits"] + 1)
    rate = tuning["lr_at_8_bits"] * (2**8 - 1) / (2**bits - 1)
    return {
        name: rate if name == "lr" and value is None else value
        for name, value in tuning["optimizer"].items()
    }


def calibrate_module(
    model: pl.LightningModule, spec: QuantSpec, data: Data, num_batches: int
) -> None:
    """Quantize `model.net` without training; the ranges come from training batches.

    Args:
        model: The module whose network is fused, prepared and calibrated in place.
        spec: Bit widths and ranges.
        data: The data set.
        num_batches: The number of training batches to calibrate with.

    Raises:
        ValueError: Inputs are not finite, or a fake quantizer received no data.
        TypeError: The network cannot run in integers.
    """
    num_batches = whole_number("num_batches", num_batches, "1 or more", 1)
    check_rounding(_net(model), spec)
    quantize_module(model, spec, stage="ptq")
    batches = islice(data.train_dataloader(), num_batches)
    # Stochastic layers draw during calibration.
    reseed(torch.device("cpu"), stream_seed(0, Stream.CALIBRATION))
    calibrate_by(spec, _net(model), (data.normalize(inputs) for inputs, _ in batches))


def quantize_module(
    pl_module: pl.LightningModule,
    spec: QuantSpec,
    stage: str = "qat",
    *,
    keep: Keep = (),
) -> None:
    """Trace, fuse and prepare `pl_module.net` if it is not prepared yet, and record the spec.

    Args:
        pl_module: The module. Its `recipe`, if there is one, gets the stage and the spec.
        spec: Bit widths and ranges.
        stage: `qat` if training follows, `ptq` if calibration follows.
        keep: Modules that stay in float, see `bqnn.quant.mark.mark`.

    Raises:
        TypeError: The module has no network `net`, or the network cannot run in integers.
    """
    net = _net(pl_module)
    if not is_prepared(net):
        marked = mark(net, keep=[*spec.keep, *entries(keep)], trains=stage == "qat")
        prepared = prepare(fuse(marked), spec)
        pl_module.net = prepared  # a traced network is a new module
        if _net(pl_module) is not prepared:
            raise TypeError(
                f"{type(pl_module).__name__}.net is a property, so the quantized network cannot "
                "replace it; assign the network to the attribute `net`"
            )
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
            f"{type(pl_module).__name__} has no attribute `net`, which holds the network to "
            "quantize; rename the attribute of the network to `net`"
        )
    return net
