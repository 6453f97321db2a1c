"""A tensor at another width computes as in a network that was calibrated with an override."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bqnn.layers.draws import held_draw
from bqnn.quant.budget import overrides
from bqnn.quant.fuse import fuse
from bqnn.quant.sensitivity import activation_tensors, stored_tensors
from bqnn.quant.simulated import calibrate, prepare
from bqnn.quant.spec import QuantSpec
from bqnn.quant.summary import sizes
from tests.quant.conftest import float_net, inputs

FULL = QuantSpec(activation_bits=8, sigma_bits=8, activation_observer="histogram")


def calibrated(method: str, net: str, spec: QuantSpec) -> nn.Module:
    prepared = prepare(fuse(float_net(method, net)), spec)
    torch.manual_seed(11)
    return calibrate(prepared, [inputs(net, 32)])


def outputs(net: nn.Module, x: torch.Tensor, draw: int = 1) -> torch.Tensor:
    with torch.no_grad(), held_draw(net, draw, torch.Generator().manual_seed(7)):
        return net(x)


@pytest.mark.parametrize(
    ("method", "net", "options"),
    [
        ("pointwise", "resnet", {}),
        ("bbb", "lenet", {"weight_observer": "least_squares", "rounding": "stochastic"}),
        ("bbb", "resnet", {"sigma_grid": "log", "weight_granularity": "tensor"}),
        ("bbb", "mlp", {"strategy": "weights"}),
        ("mcdropout", "mlp", {"strategy": "parameters"}),
        ("sghmc", "lenet", {}),
    ],
)
def test_one_tensor_at_a_width_is_an_override(method: str, net: str, options: dict) -> None:
    spec = replace(FULL, **options)
    full, x = calibrated(method, net, spec), inputs(net, 16)
    before = outputs(full, x)
    tensors = stored_tensors(full)
    kinds = {tensor.tensor for tensor in tensors}
    has_sigma = method == "bbb" and spec.strategy != "weights"
    assert kinds == ({"mean", "sigma"} if has_sigma else {"mean" if method == "bbb" else "weight"})
    activations = activation_tensors(full, x)
    for tensor, bits in [
        (tensors[0], 3),
        (tensors[-1], 2),
        (activations[0], 4),
        (activations[-1], 5),
    ]:
        override = overrides({(tensor.layer, tensor.tensor): bits})
        expected = calibrated(method, net, replace(spec, overrides=tuple(override)))
        with tensor.at(bits, spec):
            assert torch.equal(outputs(full, x), outputs(expected, x)), tensor
            if tensor in tensors:
                less = tensor.packed_bytes(8) - tensor.packed_bytes(bits)
                assert sizes(full)["packed_bytes"] == sizes(expected)["packed_bytes"]
        if tensor in tensors:
            whole = sizes(full)["packed_bytes"]
            assert sizes(expected)["packed_bytes"] == whole - less
        assert torch.equal(outputs(full, x), before)


def test_activations_are_counted_without_the_outputs() -> None:
    net = calibrated("mcdropout", "mlp", FULL)
    counts = [(each.layer, each.values) for each in activation_tensors(net, inputs("mlp", 5))]
    assert [count for _, count in counts] == [6, 24, 24]
    assert all(each.packed_bytes(3) == 0 for each in activation_tensors(net, inputs("mlp")))
