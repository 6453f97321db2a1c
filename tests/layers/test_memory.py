"""Layers with shared memory are refused if a conversion would break the sharing."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bqnn.layers.bayes import to_bayes
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.markers import Enter, Leave
from bqnn.layers.memory import shared
from bqnn.quant.fuse import fuse


def net(size: int = 4) -> nn.Sequential:
    return nn.Sequential(Enter(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), Leave())


def tied(make: Callable[[torch.Tensor], torch.Tensor]) -> nn.Sequential:
    """Create a network whose second weight uses the memory of the first."""
    made = net()
    made[3].weight = nn.Parameter(make(made[1].weight.detach()))
    return made


def parts(first: tuple[int, ...], second: tuple[int, ...]) -> nn.Sequential:
    """Create a network whose weights are views of one vector, each with a start and strides."""
    made, vector = net(), torch.randn(64)
    for layer, (start, *steps) in ((made[1], first), (made[3], second)):
        layer.weight = nn.Parameter(vector.as_strided((4, 4), steps, start))
    return made


def by_numpy() -> nn.Sequential:
    made, array = net(), np.zeros((5, 4), np.float32)
    made[1].weight = nn.Parameter(torch.from_numpy(array[:4]))
    made[3].weight = nn.Parameter(torch.from_numpy(array[1:]))
    return made


def by_data() -> nn.Sequential:
    made = net()
    made[3].weight.data = made[1].weight.data
    return made


def by_bias() -> nn.Sequential:
    made = net()
    made[3].bias = nn.Parameter(made[1].weight.detach()[2])
    return made


def by_buffer() -> nn.Sequential:
    made = net()
    made[0].register_buffer("kept", made[1].weight.detach()[:2, 1])
    return made


OVERLAPPING: dict[str, Callable[[], nn.Sequential]] = {
    "view": lambda: tied(lambda weight: weight.view(4, 4)),
    "transposed": lambda: tied(lambda weight: weight.t()),
    "flipped view": lambda: tied(lambda weight: weight.view(2, 8).view(4, 4)),
    "data": by_data,
    "at different offsets": lambda: parts((0, 4, 1), (1, 4, 1)),
    "the last number": lambda: parts((0, 4, 1), (15, 4, 1)),
    "between": lambda: parts((0, 8, 2), (2, 8, 2)),
    "numpy": by_numpy,
    "bias": by_bias,
    "buffer": by_buffer,
}


def flattened() -> nn.Sequential:
    """Make all parameters parts of one vector, as vector_to_parameters does."""
    made = net()
    vector_to_parameters(parameters_to_vector(made.parameters()).detach(), made.parameters())
    return made


DISJOINT: dict[str, Callable[[], nn.Sequential]] = {
    "nothing shared": net,
    "one vector": flattened,
    "neighbours": lambda: parts((0, 4, 1), (16, 4, 1)),
    "interleaved": lambda: parts((0, 8, 2), (1, 8, 2)),
    "empty": lambda: net(0),
    "meta": lambda: net().to("meta"),
}
CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fuse": fuse,
    "to_bayes": lambda made: to_bayes(made, 1.0, -3.0),
    "ensemble": lambda made: Ensemble(made, 2),
}


@pytest.mark.parametrize("made", OVERLAPPING)
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_shared_memory_is_refused(conversion, made):
    overlapping = OVERLAPPING[made]()
    before = copy.deepcopy(overlapping.state_dict())
    with pytest.raises(
        TypeError, match=r"(share memory|are one parameter), and .*; give each"
    ) as error:
        CONVERSIONS[conversion](overlapping)
    assert "1.weight" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in overlapping.state_dict().items())


@pytest.mark.parametrize("made", DISJOINT)
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_parts_that_have_nothing_in_common_are_converted(conversion, made):
    CONVERSIONS[conversion](DISJOINT[made]())


def test_one_parameter_of_two_layers_stays_one_in_an_ensemble():
    made = net()
    made[3].weight = made[1].weight
    ensemble = Ensemble(made, 2)
    ensemble.collect()
    assert ensemble.members[0][3].weight is ensemble.members[0][1].weight
    with pytest.raises(TypeError, match=r"^1\.weight and 3\.weight are one parameter"):
        fuse(made)


def test_sharing_without_memory_is_seen_where_it_is_one_tensor():
    made = net().to("meta")
    assert list(shared(made)) == []
    made[3].weight = made[1].weight
    assert [(a.name, b.name) for a, b in shared(made)] == [("1.weight", "3.weight")]


def test_buffers_may_share():
    made = net()
    ids = torch.arange(4)
    made[0].register_buffer("ids", ids)
    made[4].register_buffer("ids", ids[:2])
    assert list(shared(made)) == []
    Ensemble(made, 2)
