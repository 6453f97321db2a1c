"""Members of an ensemble are trained independently of each other."""

from typing import Any

import pytest
import torch
from torch import nn

from bqnn.methods import DeepEnsemble, Pointwise
from tests.bare_trainer import bare_trainer
from tests.small_methods import (
    NUM_ROWS,
    OPTIONS,
    image_method,
    images,
    lenet,
    made,
    table,
    table_method,
    with_other_weights,
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
)
def test_each_member_is_the_pointwise_network_that_is_trained_alone(options):
    changes = {"schedule": "cosine", "optimizer": {**OPTIONS["ensemble"]["optimizer"]}}
    ensemble = image_method("ensemble", **changes)
    assert isinstance(ensemble, DeepEnsemble)
    bare_trainer(3, **options).fit(ensemble, images())
    for number, member in enumerate(ensemble.net.members):
        net = with_other_weights(lenet(), number) if number else lenet()
        alone = image_method("pointwise", net=net, **changes)
        bare_trainer(3, **options).fit(alone, images())
        for name, value in alone.net.state_dict().items():
            assert torch.equal(member.state_dict()[name], value), f"{name} of member {number}"


def test_logged_terms_are_means_over_members():
    method = table_method("ensemble", optimizer={"name": "sgd", "lr": 1e-30})
    fit = bare_trainer(1)
    fit.fit(method, table())
    x, y = table().inputs, table().targets
    with torch.no_grad():
        losses = [method.likelihood.loss(member(x), y) for member in method.net.members]
    mean = torch.stack(losses).mean()
    torch.testing.assert_close(fit.callback_metrics["train/loss"], mean)
    torch.testing.assert_close(fit.callback_metrics["train/nll"], mean)


def test_layers_that_are_not_trained_stay_as_they_are():
    net = lenet()
    net.features[1].requires_grad_(False)
    method = made(
        "ensemble",
        net,
        image_method("pointwise").likelihood,
        num_train=NUM_ROWS,
        seed=0,
        **OPTIONS["ensemble"],
    )
    before = [member.features[1].weight.clone() for member in method.net.members]
    bare_trainer(1).fit(method, images())
    for member, weight in zip(method.net.members, before, strict=True):
        assert torch.equal(member.features[1].weight, weight)


class TwoWays(nn.Module):
    """Has a layer that `forward` does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.used(x)
        return out


def test_weight_decay_does_not_move_a_layer_that_is_not_called():
    pointwise = table_method("pointwise")
    options: dict[str, Any] = {"num_train": NUM_ROWS, "seed": 0}
    options["optimizer"] = {"name": "adam", "lr": 0.1, "weight_decay": 0.1}
    net = TwoWays()
    before = net.unused.weight.clone()
    for name in ("pointwise", "ensemble"):
        changes = {"num_members": 2} if name == "ensemble" else {}
        method = made(name, net, pointwise.likelihood, **options, **changes)
        bare_trainer(1).fit(method, table())
        assert torch.equal(net.unused.weight, before)
    assert isinstance(pointwise, Pointwise)


def test_the_number_of_members_is_checked():
    with pytest.raises(ValueError, match=r"^num_members=0: an ensemble has at least one member"):
        table_method("ensemble", num_members=0)
    method = table_method("ensemble", num_members=2)
    with pytest.raises(ValueError, match=r"^num_samples=3: .* 2 members.*more \(num_members\)$"):
        method.check_samples(3)


@pytest.mark.parametrize("task", ["images", "table"])
def test_members_that_imitate_themselves_stay_as_they_are(task: str) -> None:
    make, rows = (image_method, images) if task == "images" else (table_method, table)
    trained = []
    for imitates in (False, True):
        method = make("ensemble", optimizer={"name": "sgd", "lr": 0.1})
        assert isinstance(method, DeepEnsemble)
        before = [param.detach().clone() for param in method.net.members.parameters()]
        if imitates:
            method.imitate()
        keys = method.state_dict().keys()
        bare_trainer(2).fit(method, rows())
        assert method.state_dict().keys() == keys
        after = list(method.net.members.parameters())
        trained.append(
            max(float((a - b).detach().abs().max()) for a, b in zip(after, before, strict=True))
        )
    assert trained[0] > 1e-2
    assert trained[1] < 1e-5
