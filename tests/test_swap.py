"""Swapping by type: what is replaced, what is kept, what is refused."""

import pytest
from torch import nn

from bqnn.layers.bayes import to_bayes
from bqnn.layers.swap import swap


class Wider(nn.Linear):
    """A subclass, which no replacement of Linear may take for one."""


def to_identity(layer: nn.Linear) -> nn.Module:
    return nn.Identity()


def test_every_layer_of_a_type_is_replaced_at_any_depth_and_counted():
    inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    net = nn.Sequential(nn.Linear(2, 3), inner, nn.BatchNorm2d(3))
    replaced = []

    def remember(layer: nn.Linear) -> nn.Module:
        replaced.append(layer.in_features)
        return nn.Identity()

    assert swap(net, {nn.Linear: remember}, keep=(nn.BatchNorm2d,)) == 2
    assert replaced == [2, 3]
    assert isinstance(net[0], nn.Identity)
    assert isinstance(net[1][0], nn.Identity)
    assert isinstance(net[1][1], nn.ReLU)
    assert isinstance(net[2], nn.BatchNorm2d)


def test_a_replacement_may_contain_the_type_that_it_replaces():
    net = nn.Sequential(nn.Linear(2, 2))
    assert swap(net, {nn.Linear: lambda layer: nn.Sequential(layer, nn.ReLU())}) == 1
    assert isinstance(net[0][0], nn.Linear)


def test_nothing_to_replace_is_a_count_of_zero():
    assert swap(nn.Sequential(nn.ReLU()), {nn.Linear: to_identity}) == 0


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(1, 1, 1), nn.LayerNorm(1), nn.LSTM(1, 1), Wider(1, 1)], ids=repr
)
def test_an_unknown_layer_with_weights_is_refused_by_its_path(layer):
    net = nn.Sequential(nn.ReLU(), nn.ModuleDict({"deep": layer}))
    kind = type(layer).__name__
    with pytest.raises(TypeError, match=rf"1\.deep is a {kind}.* it knows Linear, BatchNorm2d"):
        swap(net, {nn.Linear: to_identity}, keep=(nn.BatchNorm2d,))


def test_an_unknown_layer_at_the_top_is_refused_by_its_name():
    with pytest.raises(TypeError, match=r"^0 is a Conv1d"):
        swap(nn.Sequential(nn.Conv1d(1, 1, 1)), {nn.Linear: to_identity})


def test_a_layer_in_two_places_stays_one_layer():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    to_bayes(net, prior_std=1.0, init_rho=-3.0)
    assert type(net[0]).__name__ == "BayesLinear"
    assert net[0] is net[2]
