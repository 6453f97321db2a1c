"""Ensemble: the members that it keeps, their draws, and exact reloading."""

import pytest
import torch
from torch import Tensor, nn

from bqnn.layers.draws import held_draw
from bqnn.layers.ensemble import Ensemble

ONE = torch.ones(1, 1)


def scale(factor: float) -> nn.Linear:
    """Create a network that multiplies by `factor`, so that outputs identify it."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, factor)
    return net


def collected(factors: list[float], num_members: int) -> Ensemble:
    """Create an ensemble that has collected the current network at each of these factors."""
    ensemble = Ensemble(scale(0), num_members)
    for factor in factors:
        nn.init.constant_(ensemble.current.weight, factor)
        ensemble.collect()
    return ensemble


def members(ensemble: Ensemble) -> list[float]:
    """Return the output of each held draw for the input 1."""
    answers = []
    for index in range(len(ensemble)):
        with held_draw(ensemble, index):
            answers.append(ensemble(ONE).item())
    return answers


def test_members_are_copies_that_later_training_does_not_change():
    ensemble = collected([2], num_members=3).eval()
    nn.init.constant_(ensemble.current.weight, 5)
    assert members(ensemble) == [2]
    assert ensemble.current(ONE) == 5


@pytest.mark.parametrize(
    ("factors", "kept"),
    [([1], [1]), ([1, 2], [2, 1]), ([1, 2, 3, 4], [4, 3, 2]), (range(1, 9), [8, 7, 6])],
)
def test_the_last_members_are_kept_and_drawn_newest_first(factors, kept):
    ensemble = collected(factors, num_members=3).eval()
    assert len(ensemble) == len(kept)
    assert members(ensemble) == kept


def test_buffers_are_collected_with_the_weights():
    ensemble = Ensemble(nn.BatchNorm2d(1), num_members=1)
    ensemble.collect()
    ensemble(torch.full((2, 1, 2, 2), 10.0))  # moves the running mean a tenth of the way
    ensemble.collect()
    torch.testing.assert_close(ensemble.members[0].running_mean, torch.tensor([1.0]))


def test_the_current_network_answers_in_training_and_before_there_are_members():
    empty = Ensemble(scale(7), num_members=3).eval()
    assert empty(ONE) == 7
    with held_draw(empty, 4):
        assert empty(ONE) == 7

    ensemble = collected([1, 2], num_members=3)
    nn.init.constant_(ensemble.current.weight, 9)
    assert [ensemble.train()(ONE).item() for _ in range(3)] == [9, 9, 9]


def test_members_take_turns_outside_a_held_draw():
    ensemble = collected([1, 2, 3], num_members=3).eval()
    answers = [ensemble(ONE).item() for _ in range(6)]
    assert sorted(answers[:3]) == [1, 2, 3]
    assert answers[3:] == answers[:3]


def test_a_draw_beyond_the_members_is_refused():
    ensemble = collected([1, 2], num_members=5).eval()
    with (
        pytest.raises(ValueError, match="draw 2 of an ensemble with 2 members"),
        held_draw(ensemble, 2),
    ):
        pass
    with held_draw(ensemble, 1):
        assert ensemble(ONE) == 1
    with pytest.raises(ValueError, match="num_members=0"):
        Ensemble(scale(1), num_members=0)


def test_networks_that_cannot_be_copied_are_refused_before_training():
    norms = (torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.spectral_norm)
    old, new = (nn.Sequential(norm(nn.Linear(2, 2))) for norm in norms)
    with pytest.raises(TypeError, match=r"^0\.weight is a tensor but neither a parameter"):
        Ensemble(old, num_members=2)
    ensemble = Ensemble(new, num_members=2)
    x = torch.ones(3, 2)
    new(x).sum().backward()
    ensemble.collect()
    new.eval()
    assert torch.equal(ensemble.eval()(x), new(x))


def test_an_ensemble_of_networks_has_them_as_members_and_follows_the_newest():
    nets = [scale(factor) for factor in (1, 2, 3)]
    nets[1].requires_grad_(False)
    ensemble = Ensemble.of(nets)
    assert [*ensemble.members] == nets
    assert members(ensemble.eval()) == [3, 2, 1]
    trained = [name for name, weight in ensemble.named_parameters() if weight.requires_grad]
    assert trained == ["members.0.weight", "members.2.weight"]
    nn.init.constant_(nets[2].weight, 7)
    assert ensemble.current(ONE) == 3
    ensemble.follow()
    assert ensemble.current(ONE) == 7


def test_an_ensemble_of_networks_loads_only_states_with_all_of_them():
    ensemble, state = (Ensemble.of([scale(1), scale(factor)]) for factor in (2, 3))
    ensemble.load_state_dict(state.state_dict(), strict=True)
    assert members(ensemble.eval()) == [3, 1]
    for fewer in (collected([1], num_members=2), collected([], num_members=2)):
        with pytest.raises(RuntimeError, match=r"^collected=[01] members, but the ensemble has 2"):
            ensemble.load_state_dict(fewer.state_dict())


def test_networks_with_other_layers_make_no_ensemble():
    with pytest.raises(ValueError, match=r"^nets: their layers differ"):
        Ensemble.of([nn.Linear(1, 1), nn.Linear(1, 2)])
    with pytest.raises(ValueError, match=r"^nets: their layers differ"):
        Ensemble.of([nn.Linear(1, 1), nn.Linear(1, 1, bias=False)])


def test_only_the_current_network_is_trained():
    ensemble = collected([1, 2], num_members=2)
    assert ensemble.current.weight.requires_grad
    assert not any(weight.requires_grad for weight in ensemble.members.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_members_are_in_the_mode_of_the_ensemble(training):
    ensemble = Ensemble(nn.Sequential(nn.Linear(1, 1), nn.Dropout()), 1).train(training)
    ensemble.collect()
    assert all(module.training is training for module in ensemble.members.modules())


@pytest.mark.parametrize("count", [0, 1, 3, 4])
@pytest.mark.parametrize("count_before", [0, 2, 3])
def test_a_state_loads_strictly_into_any_ensemble_and_answers_the_same(count, count_before):
    saved = collected([10.0 * i for i in range(count)], num_members=3)
    nn.init.constant_(saved.current.weight, 99)
    loaded = collected([-1] * count_before, num_members=3)
    loaded.load_state_dict(saved.state_dict(), strict=True)
    assert members(loaded.eval()) == members(saved.eval())
    assert loaded.current(ONE) == 99
    assert not any(weight.requires_grad for weight in loaded.members.parameters())

    for ensemble in (saved, loaded):  # and goes on the same: the ring's position is in the state
        nn.init.constant_(ensemble.current.weight, 55)
        ensemble.collect()
    assert members(loaded) == members(saved)


def test_an_ensemble_inside_a_module_loads_strictly_too():
    saved = nn.ModuleDict({"net": collected([1, 2], num_members=3)})
    loaded = nn.ModuleDict({"net": Ensemble(scale(0), num_members=3)})
    loaded.load_state_dict(saved.state_dict(), strict=True)
    assert members(loaded["net"].eval()) == [2, 1]


def test_a_state_of_more_members_than_there_is_room_for_is_refused():
    saved = collected([1, 2, 3], num_members=3).state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Ensemble(scale(0), num_members=2).load_state_dict(saved)


def test_a_held_draw_is_released_even_after_an_error():
    ensemble = collected([1, 2], num_members=2).eval()

    def interrupted() -> Tensor:
        with held_draw(ensemble, 1):
            assert ensemble(ONE) == ensemble(ONE) == 1
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert {ensemble(ONE).item() for _ in range(2)} == {1, 2}
