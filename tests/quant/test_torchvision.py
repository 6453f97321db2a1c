"""Unmodified networks of torchvision: Bayesian, quantized after or during training, in int8."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from torchvision.ops import SqueezeExcitation, StochasticDepth

from bqnn.inference.likelihoods import Classification
from bqnn.inference.predict import predictive
from bqnn.layers.bayes import GaussianWeight, to_bayes
from bqnn.layers.dropout import MCDropout, to_mcdropout
from bqnn.methods.bbb import BayesByBackprop
from bqnn.methods.mcdropout import MCDropoutMethod
from bqnn.methods.sghmc import SGHMCEnsemble
from bqnn.quant.callback import QuantizationCallback
from bqnn.quant.integer import convert
from bqnn.quant.quantize import prepare_qat, quantize
from bqnn.quant.simulated import calibrate
from bqnn.quant.spec import QuantSpec
from tests.bare_trainer import bare_trainer

PIXELS = 32
SPEC = QuantSpec(activation_observer="minmax")


def images(rows: int = 16) -> Tensor:
    return torch.randn(rows, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))


def made(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """Create a network in evaluation mode with batch norm statistics of the images."""
    torch.manual_seed(0)
    net = make(num_classes=10, **options).train()
    with torch.no_grad():
        for _ in range(10):
            net(images())
    return net.eval()


def small_resnet(num_classes: int) -> nn.Module:
    net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    net.layer3 = net.layer4 = nn.Identity()
    net.fc = nn.Linear(128, num_classes)
    return net


def small_mobilenet(num_classes: int) -> nn.Module:
    settings = [[1, 8, 1, 1], [3, 12, 2, 2], [3, 16, 1, 2]]
    return models.MobileNetV2(num_classes, 0.5, settings, dropout=0.3)


def small_vgg(num_classes: int) -> nn.Module:
    layers = models.vgg.make_layers([8, "M", 12, "M", 16, "M"], batch_norm=True)
    net = models.VGG(layers, num_classes, init_weights=False, dropout=0.4)
    net.classifier = nn.Sequential(
        nn.Linear(16 * 49, 32), nn.ReLU(True), nn.Dropout(0.4), nn.Linear(32, num_classes)
    )
    return net


def small_densenet(num_classes: int) -> nn.Module:
    return models.DenseNet(8, (2, 2), 8, num_classes=num_classes)


def small_squeezenet(num_classes: int) -> nn.Module:
    return models.SqueezeNet("1_1", num_classes)


def small_shufflenet(num_classes: int) -> nn.Module:
    return models.ShuffleNetV2([1, 1, 1], [8, 12, 16, 24, 32], num_classes)


SMALL = [
    small_resnet,
    small_mobilenet,
    small_vgg,
    small_densenet,
    small_squeezenet,
    small_shufflenet,
]
by_net = pytest.mark.parametrize("make", SMALL, ids=lambda make: make.__name__)
LARGE: dict[str, dict[str, Any]] = {
    "alexnet": {},
    "densenet121": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "mnasnet0_5": {},
    "mobilenet_v2": {},
    "regnet_x_400mf": {},
    "resnet18": {},
    "resnext50_32x4d": {},
    "shufflenet_v2_x0_5": {},
    "squeezenet1_0": {},
    "vgg11": {},
    "vgg11_bn": {},
}


def assert_int8_is_simulated(simulated: nn.Module, x: Tensor) -> None:
    expected = predictive(simulated.eval(), x, num_samples=2)
    assert expected.std() > 0
    assert torch.equal(predictive(convert(simulated, probe=x[:4]), x, num_samples=2), expected)


@by_net
@pytest.mark.parametrize("method", ["pointwise", "bbb", "mcdropout"])
def test_a_calibrated_network_computes_the_simulated_integers(
    make: Callable[..., nn.Module], method: str
) -> None:
    net = made(make)
    if method == "bbb":
        to_bayes(net, prior_std=0.1, init_rho=-5.0)
        assert any(isinstance(module, GaussianWeight) for module in net.modules())
    elif method == "mcdropout" and any(isinstance(m, nn.Dropout) for m in net.modules()):
        to_mcdropout(net)
        assert any(isinstance(m, MCDropout) and m.rate >= 0.3 for m in net.modules())
    simulated = calibrate(prepare_qat(net, SPEC), [images()])
    assert_int8_is_simulated(simulated, images())


@by_net
def test_one_call_quantizes_a_copy(make: Callable[..., nn.Module]) -> None:
    net = made(make)
    before, expected = deepcopy(net.state_dict()), net(images())
    state = torch.get_rng_state()
    integer = quantize(net, [(x, torch.zeros(8)) for x in images().split(8)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net(images()), expected)
    error = (integer(images()) - expected).norm() / expected.norm()
    assert error < 0.5


class Classifier(pl.LightningModule):
    """A module as a user could write it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(images(24), torch.arange(24) % 10), batch_size=8)


@by_net
def test_a_network_is_trained_in_any_lightning_module(make: Callable[..., nn.Module]) -> None:
    module = Classifier(made(make))
    before = deepcopy(module.net.state_dict())
    trainer = bare_trainer(2, callbacks=[QuantizationCallback(QuantSpec(weight_bits=6))])
    trainer.fit(module, loader())
    first = next(iter(before))
    assert not torch.equal(module.net.state_dict()[first], before[first])
    assert_int8_is_simulated(module.net, images())


OPTIONS = {"num_train": 24, "seed": 0, "optimizer": {"name": "adam", "lr": 1e-3}}
SAMPLER = OPTIONS | {"optimizer": {"name": "sghmc", "lr": 1e-3}}
METHODS: dict[str, Callable[..., pl.LightningModule]] = {
    "bbb": partial(BayesByBackprop, prior_std=0.1, init_rho=-5.0, beta=1.0, **OPTIONS),
    "mcdropout": partial(MCDropoutMethod, rate=None, **OPTIONS),
    "sghmc": partial(SGHMCEnsemble, burn_in=0, collect_every=1, num_members=2, **SAMPLER),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_a_network_before_and_while_it_is_quantized(method: str) -> None:
    model = METHODS[method](made(small_vgg), Classification(list("0123456789")))
    bare_trainer(2).fit(model, loader())
    tuned = model.fine_tuning({"name": "adam", "lr": 1e-4}, prior_weight=1.0)
    bare_trainer(1, callbacks=[QuantizationCallback(QuantSpec())]).fit(tuned, loader())
    x = images().to(memory_format=torch.channels_last)
    assert_int8_is_simulated(tuned.net, x)


def small_vit(num_classes: int) -> nn.Module:
    return models.VisionTransformer(PIXELS, 8, 1, 2, 16, 32, num_classes=num_classes)


def small_swin(num_classes: int) -> nn.Module:
    return models.SwinTransformer([4, 4], 8, [1, 1], [1, 1], [4, 4], num_classes=num_classes)


def small_convnext(num_classes: int) -> nn.Module:
    blocks = [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1)]
    return models.ConvNeXt(blocks, 0.1, num_classes=num_classes)


REFUSED: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "convnext": (small_convnext, "layer_norm, called by features.0.1"),
    "efficientnet": (models.efficientnet_b0, "features.0.2, a SiLU"),
    "mobilenet_v3": (models.mobilenet_v3_small, "features.0.2, a Hardswish"),
    "regnet_y": (models.regnet_y_400mf, "se.scale_activation, a Sigmoid"),
    "swin": (small_swin, "features.0.2, a LayerNorm"),
    "vit": (small_vit, "expand, called by the network itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_integers_is_refused_before_any_batch(name: str) -> None:
    make, message = REFUSED[name]

    def batches() -> Any:
        raise AssertionError("a batch was asked for")
        yield

    with pytest.raises(TypeError, match=message) as error:
        quantize(make(num_classes=10), batches())
    assert "\n" not in str(error.value)
    assert "keep=(" in str(error.value)


def test_an_auxiliary_output_can_be_calibrated_but_not_trained() -> None:
    net = models.googlenet(num_classes=10, init_weights=False)
    with pytest.raises(TypeError, match=r"something else in training than .* aux1"):
        prepare_qat(net)


@pytest.mark.parametrize(
    ("make", "keep"),
    [
        (models.mobilenet_v3_small, (SqueezeExcitation, nn.Hardswish)),
        pytest.param(
            models.efficientnet_b0,
            (SqueezeExcitation, nn.SiLU, StochasticDepth),
            marks=pytest.mark.slow,
        ),
        pytest.param(models.regnet_y_400mf, SqueezeExcitation, marks=pytest.mark.slow),
    ],
)
def test_squeeze_and_excitation_can_stay_in_float(
    make: Callable[..., nn.Module], keep: Any
) -> None:
    simulated = calibrate(prepare_qat(made(make), SPEC, keep=keep), [images()])
    assert_int8_is_simulated(simulated, images())


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_architectures_of_torchvision_compute_the_simulated_integers(name: str) -> None:
    pixels = 96 if name in ("alexnet", "inception_v3") else 64
    torch.manual_seed(0)
    net = getattr(models, name)(num_classes=10, **LARGE[name]).train()
    x = torch.randn(16, 3, pixels, pixels)
    with torch.no_grad():
        net(x)
    simulated = calibrate(prepare_qat(net.eval(), SPEC), [x])
    assert_int8_is_simulated(simulated, x[:4])
