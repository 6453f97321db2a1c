"""The epochs in which chains start, explore, sample and give members."""

import math

import pytest

from bqnn.methods.sampling import SamplingPlan


def plan(**changes: object) -> SamplingPlan:
    return SamplingPlan(**{"burn_in": 2, "collect_every": 1, "num_members": 6, **changes})


@pytest.mark.parametrize(
    ("changes", "max_epochs", "expected"),
    [
        ({}, 10, [2, 3, 4, 5, 6, 7, 8, 9]),  # the ensemble keeps the last 6
        ({"collect_every": 3}, 10, [4, 7]),
        ({"chain_epochs": 5}, 10, [2, 3, 4, 7, 8, 9]),
        ({"chain_epochs": 5, "num_members": 4}, 10, [3, 4, 8, 9]),
        ({"chain_epochs": 5, "num_members": 1}, 10, [4, 9]),
        ({"chain_epochs": 5}, 12, [3, 4, 8, 9]),  # the third chain has no member yet
        ({"cycle_epochs": 4, "exploration": 0.5}, 10, [4, 5, 8, 9]),
        ({"cycle_epochs": 4, "exploration": 0.8}, 10, [5, 9]),
        ({"cycle_epochs": 4, "exploration": 0.0, "collect_every": 2}, 10, [3, 5, 7, 9]),
        ({"cycle_epochs": 3, "exploration": 0.5, "chain_epochs": 6}, 12, [3, 4, 9, 10]),
        ({"burn_in": 10}, 10, []),
    ],
)
def test_members_are_collected_at_the_ends_of_these_epochs(changes, max_epochs, expected):
    assert plan(**changes).collected(max_epochs) == expected


def test_every_chain_starts_and_is_optimized_first():
    found = plan(chain_epochs=4, optimize_epochs=1)
    assert [epoch for epoch in range(12) if found.starts_chain(epoch)] == [4, 8]
    assert [found.chain(epoch) for epoch in (0, 3, 4, 11)] == [0, 0, 1, 2]
    assert [found.has_noise(time) for time in (0, 0.9, 1, 3.9, 4, 4.5, 5)] == [
        *(False, False, True, True, False, False, True),
    ]
    assert not any(plan().starts_chain(epoch) for epoch in range(99))


def test_the_squared_step_falls_along_a_cosine_in_each_cycle_after_burn_in():
    found = plan(cycle_epochs=4, exploration=0.5)
    assert [found.step_share(time) for time in (0, 1.99, 2)] == [1, 1, 1]
    for time in (2.5, 3, 4, 5.9, 6.5, 9.9):
        share = (time - 2) % 4 / 4
        assert found.step_share(time) ** 2 == pytest.approx((1 + math.cos(math.pi * share)) / 2)
    assert [found.has_noise(time) for time in (1, 2, 3.9, 4, 5.9, 6, 8)] == [
        *(True, False, False, True, True, False, True),
    ]
    assert [plan().step_share(time) for time in (0, 7.3)] == [1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"burn_in": -1}, "burn_in=-1"),
        ({"collect_every": 0}, "collect_every=0"),
        ({"chain_epochs": 0}, "chain_epochs=0"),
        ({"cycle_epochs": 0}, "cycle_epochs=0"),
        ({"optimize_epochs": -1}, "optimize_epochs=-1"),
        ({"exploration": 1.0}, r"exploration=1\.0"),
        ({"chain_epochs": 2}, r"chain_epochs=2: .* after 3 epochs .*; choose more"),
    ],
)
def test_a_bad_number_is_refused_by_its_name(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)
