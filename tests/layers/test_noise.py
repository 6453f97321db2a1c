"""Noise has the right moments, and the same numbers on any number of cores."""

import math

import pytest
import torch
from torch import Tensor

from bqnn.layers import noise
from bqnn.layers.noise import MIN_PARALLEL, coins_like, noise_like

# One size for each way that noise is drawn.
SHAPES = {"small": (8, 6, 16, 16), "large": (8, 32, 64, 65)}


def drawn(shape: tuple[int, ...], layout: torch.memory_format, std: float = 1.0) -> Tensor:
    return noise_like(torch.empty(shape, memory_format=layout), std)


def test_shapes_fall_on_both_sides_of_the_parallel_path():
    assert math.prod(SHAPES["small"]) < MIN_PARALLEL <= math.prod(SHAPES["large"])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("std", [1.0, 0.5])
def test_noise_is_standard_normal_times_std(shape, std):
    torch.manual_seed(0)
    scores = drawn(shape, torch.contiguous_format, std).double() / std
    # moments 1 to 4 of N(0, 1) are 0, 1, 0, 3, with variances 1, 2, 15, 96 per draw
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        error = 5 * math.sqrt(variance / scores.numel())
        assert abs(scores.pow(power).mean() - moment) < error


def test_parts_of_a_large_tensor_are_independent():
    torch.manual_seed(0)
    parts = drawn(SHAPES["large"], torch.contiguous_format).view(noise.NUM_STREAMS, -1)
    correlations = torch.corrcoef(parts) - torch.eye(noise.NUM_STREAMS)
    assert correlations.abs().max() < 5 / math.sqrt(parts.shape[1])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_equal_seeds_give_equal_numbers_in_the_layout_of_the_tensor(shape, layout):
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(drawn(shape, layout))
    assert draws[0].is_contiguous(memory_format=layout)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_layouts_hold_the_same_numbers_in_the_order_of_their_memory(shape):
    torch.manual_seed(0)
    contiguous = drawn(shape, torch.contiguous_format)
    torch.manual_seed(0)
    channels_last = drawn(shape, torch.channels_last)
    assert torch.equal(channels_last.permute(0, 2, 3, 1).reshape(-1), contiguous.view(-1))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_second_call_goes_on_where_the_first_stopped(shape):
    torch.manual_seed(0)
    first, second = (drawn(shape, torch.contiguous_format) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_number_of_threads_changes_no_number(shape):
    before = torch.get_num_threads()
    draws = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            draws.append(drawn(shape, torch.contiguous_format))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_noise_of_a_transposed_tensor_is_seen_through_its_strides():
    torch.manual_seed(0)
    x = torch.empty(300, 200).t()
    eps = noise_like(x)
    assert eps.stride() == x.stride()
    assert abs(eps.std() - 1) < 5 / math.sqrt(2 * eps.numel())


@pytest.mark.parametrize(
    "probability",
    [1e-9, 1e-6, 2**-17, 1e-4, 0.1, 1 / 3, 0.5, 0.9, 0.9999, 1 - 2**-17, 0.999999, 1 - 1e-9],
)
def test_coins_meet_any_probability(probability):
    num_coins = 2**24
    generator = torch.Generator().manual_seed(3)
    coins = coins_like(torch.empty(num_coins, device="meta"), probability, generator)
    assert coins.device.type == "meta"  # drawn on the CPU and copied
    count = int(coins_like(torch.empty(num_coins), probability, generator).sum())
    # Of the rarer side, so that its count is Poisson where it is rare.
    rare, expected = count, num_coins * probability
    if probability > 0.5:
        rare, expected = num_coins - count, num_coins * (1 - probability)
    assert abs(rare - expected) < 5 * math.sqrt(expected) + 1


@pytest.mark.parametrize(("probability", "answer"), [(0.0, False), (1.0, True)])
def test_coins_that_are_certain_are_certain(probability, answer):
    assert (coins_like(torch.empty(10_000), probability) == answer).all()


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("probability", [1e-5, 0.3])
def test_coins_of_any_number_have_the_shape_of_the_tensor(size, probability):
    assert coins_like(torch.empty(size, 1), probability).shape == (size, 1)


def test_neighboring_coins_are_independent():
    torch.manual_seed(0)
    for probability in (0.3, 1e-3):
        coins = coins_like(torch.empty(2**20, 8), probability).double()
        correlations = torch.corrcoef(coins.T) - torch.eye(8)
        assert correlations.abs().max() < 5 / 2**10
