"""A fine-tuning learns what the network predicts in float, draw by draw."""

import pytest
import torch
from torch import Tensor, nn

from bqnn.layers.bayes import BayesConv2d, BayesLinear
from bqnn.layers.dropout import MCDropout
from bqnn.layers.markers import Enter, Leave
from bqnn.methods import METHODS, Method, Pointwise
from bqnn.methods.imitation import Imitation
from bqnn.methods.terms import Terms
from bqnn.quant.fuse import fuse
from bqnn.quant.simulated import enable, freeze, prepare
from bqnn.quant.spec import QuantSpec
from tests.bare_trainer import bare_trainer
from tests.small_methods import image_method, images, table, table_method


def gradients(method: Method, inputs: Tensor, targets: Tensor) -> list[float]:
    """Return the largest gradient of each parameter for a batch in training mode."""
    method.train().zero_grad()
    loss = method.loss_terms(inputs, targets)["loss"]
    assert isinstance(loss, Tensor)
    loss.backward()
    return [float(p.grad.abs().max()) for p in method.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("task", ["images", "table"])
def test_a_network_that_imitates_itself_has_no_gradient(name: str, task: str) -> None:
    make, rows = (image_method, images()) if task == "images" else (table_method, table())
    method = make(name).fine_tuning({"name": "adam", "lr": 1e-3}, prior_weight=0.0)
    batch = next(iter(rows))
    torch.manual_seed(0)
    assert max(gradients(method, *batch)) > 1e-3
    method.imitate()
    assert max(gradients(method, *batch)) < 1e-6


@pytest.mark.parametrize("kind", ["noise", "masks"])
def test_a_draw_learns_from_the_draw_with_the_same_noise(kind: str) -> None:
    torch.manual_seed(0)
    layer = BayesLinear(10, 2, init_rho=0.0) if kind == "noise" else MCDropout(0.5)
    net = nn.Sequential(layer, nn.Linear(2 if kind == "noise" else 10, 2)).train()
    imitation, x = Imitation([net]), torch.ones(64, 10)
    first, second = imitation.predict(0, x), None
    assert torch.equal(net(x), first)
    second = imitation.predict(0, x)
    assert not torch.equal(second, first)
    assert torch.equal(net(x), second)
    assert not any(param.requires_grad for param in imitation.networks[0].parameters())


@torch.no_grad()
def test_fused_batch_norm_keeps_the_noise_of_its_layer() -> None:
    torch.manual_seed(0)
    conv, norm = BayesConv2d(2, 4, 3, init_rho=0.0), nn.BatchNorm2d(4)
    norm.weight.copy_(torch.tensor([1.0, -1.0, 0.5, -2.0]))
    norm.running_mean.normal_()
    net = nn.Sequential(Enter(), conv, norm, nn.ReLU(), Leave())
    imitation, x = Imitation([net]), torch.randn(8, 2, 5, 5)
    simulated = prepare(fuse(net), QuantSpec()).train()
    enable(simulated, False)
    freeze(simulated)
    predicted = imitation.predict(0, x)
    assert torch.allclose(simulated(x), predicted, atol=1e-4)
    assert not torch.allclose(simulated(x), predicted, atol=1e-1)  # other noise


def test_a_method_that_does_not_imitate_says_so() -> None:
    class Own(Pointwise):
        def loss_terms(self, inputs: Tensor, targets: Tensor) -> Terms:
            return {"loss": self.likelihood.loss(self(inputs), targets)}

    method = table_method("pointwise")
    own = Own(method.net, method.likelihood, num_train=100, seed=0, optimizer={"name": "adam"})
    own.imitate()
    with pytest.raises(ValueError, match=r"^imitate=true: loss_terms of Own .* choose false$"):
        bare_trainer(1).fit(own, table())
