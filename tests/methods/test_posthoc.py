"""Sigma comes after the training, and a fine-tuning keeps it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bqnn.methods import METHODS, PostHocGaussian
from bqnn.nets import LeNet, ResNet
from bqnn.quant.callback import QuantizationCallback, quantize_module
from bqnn.quant.integer import convert
from bqnn.quant.simulated import calibrate
from bqnn.quant.spec import QuantSpec
from tests.bare_trainer import bare_trainer
from tests.small_methods import image_method, images, lenet

NAMES = [name for name, method in METHODS.items() if issubclass(method, PostHocGaussian)]


def fit(method: Any, epochs: int, **options: Any) -> None:
    bare_trainer(epochs, num_sanity_val_steps=0, inference_mode=False, **options).fit(
        method, images()
    )


@pytest.mark.parametrize("name", NAMES)
def test_draws_differ_after_the_training_only(name: str) -> None:
    method = image_method(name).eval()
    draws = method.predictive(images().inputs)
    assert torch.equal(draws, draws[:1].expand_as(draws))
    fit(method, 2)
    draws = method.eval().predictive(images().inputs)
    assert not torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_keep_their_value(name: str) -> None:
    net = lenet()
    net.get_submodule("features.1").requires_grad_(False)
    method = image_method(name, net)
    assert isinstance(method, PostHocGaussian)
    frozen, trained, *_ = method.gaussian_weights().values()
    before = frozen.mean.clone()
    fit(method, 3)
    assert torch.equal(frozen.mean, before)
    assert (frozen.sigma < 1e-30).all()
    assert (trained.sigma > 1e-9).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_fine_tuning_moves_the_means_and_keeps_sigma(name: str) -> None:
    method = image_method(name)
    fit(method, 2)
    method.eval()
    assert isinstance(method, PostHocGaussian)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    tuned = method.fine_tuning({"name": "adam", "lr": 1e-2}, prior_weight=1.0)
    fit(tuned, 2, callbacks=[QuantizationCallback(QuantSpec())])
    moved = {"mean": 0, "rho": 0}
    for key, value in tuned.state_dict().items():
        kind = key.rpartition(".")[2]
        old = before.get(key, before.get(key.replace(f".{kind}", f".layer.{kind}")))
        if kind in moved and old is not None:
            moved[kind] += int((value != old).sum())
    assert moved["rho"] == 0 < moved["mean"]


@pytest.mark.parametrize("mode", ["qat", "ptq"])
@pytest.mark.parametrize("weight_bits", [8, 4, 2])
@pytest.mark.parametrize(("name", "rank"), [*((name, 0) for name in NAMES), ("swag", 3)])
def test_int8_draws_are_those_of_the_simulation(
    name: str, rank: int, weight_bits: int, mode: str
) -> None:
    spec = QuantSpec(weight_bits=weight_bits, activation_bits=7)
    noisy: dict[str, Any] = {}
    if name == "swag":
        noisy = {"scale": 1e4, "rank": rank}  # so that the noise survives the rounding
    torch.manual_seed(0)
    method = image_method(name, LeNet([1, 8, 8], [3], channels=(4, 8), hidden_features=32), **noisy)
    fit(method, 2)
    if mode == "qat":
        method = method.fine_tuning({"name": "adam", "lr": 1e-3}, prior_weight=1.0)
        fit(method, 2, callbacks=[QuantizationCallback(spec)])
    else:
        quantize_module(method, spec, "ptq")
        calibrate(method.net, [inputs for inputs, _ in images()])
    simulated = method.eval().predictive(images().inputs)
    assert not torch.equal(simulated[0], simulated[1])
    method.net = convert(method.net)
    assert torch.equal(method.predictive(images().inputs), simulated)


@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_network_has_no_training_without_sigma(name: str) -> None:
    with pytest.raises(ValueError, match=r"sets sigma after the training.* train in float"):
        fit(image_method(name), 1, callbacks=[QuantizationCallback(QuantSpec())])


@pytest.mark.parametrize("name", NAMES)
def test_a_prolonged_training_continues_from_the_network_that_was_trained(
    name: str, tmp_path: Path
) -> None:
    constant: dict[str, Any] = {"schedule": "constant"}
    whole, short, longer = (image_method(name, resnet(), **constant) for _ in range(3))
    fit(whole, 6)
    trainer = bare_trainer(3, num_sanity_val_steps=0, inference_mode=False)
    trainer.fit(short, images())
    trainer.save_checkpoint(tmp_path / "short.ckpt")
    trainer = bare_trainer(6, num_sanity_val_steps=0, inference_mode=False)
    trainer.fit(longer, images(), ckpt_path=str(tmp_path / "short.ckpt"), weights_only=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(longer.state_dict()[key], value), key


def resnet() -> ResNet:
    torch.manual_seed(0)
    return ResNet([1, 8, 8], [3], width=2, blocks_per_stage=[1])
