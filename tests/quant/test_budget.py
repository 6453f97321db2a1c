"""Widths within a budget: the exact optimum, known choices, and limits that hold."""

import itertools
import random

import pytest

from bqnn.arguments import ArgumentError
from bqnn.quant.budget import Budget, Limit, Row, allocate, choose_bits, losses, overrides
from bqnn.quant.spec import QuantSpec


def best_by_force(table: list[list[float]], limits: list[Limit]) -> float:
    """Return the least sum of losses of all choices within the limits."""
    return min(
        sum(of[place] for of, place in zip(table, places, strict=True))
        for places in itertools.product(*(range(len(of)) for of in table))
        if all(limit.reached(places) <= limit.value for limit in limits)
    )


@pytest.mark.parametrize("seed", range(30))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    widths = sorted(draw.sample(range(2, 9), draw.randint(2, 4)))
    counts = [draw.randint(1, 10 ** draw.randint(1, 6)) for _ in range(draw.randint(1, 6))]
    table = [[draw.expovariate(10 ** draw.uniform(0, 4)) for _ in widths] for _ in counts]
    bits = [[count * width for width in widths] for count in counts]
    size = [[-(-count * width // 8) for width in widths] for count in counts]
    mean = draw.uniform(widths[0], widths[-1])
    limits = [
        Limit("mean_bits", mean, bits, divisor=sum(counts)),
        Limit("bytes", draw.randint(sum(of[0] for of in size), sum(of[-1] for of in size)) + 7,
              size, offset=7),
    ]  # fmt: skip
    limits = draw.choice([limits, limits[:1], limits[1:]])
    places = allocate(table, limits)
    assert all(limit.reached(places) <= limit.value for limit in limits)
    found = sum(of[place] for of, place in zip(table, places, strict=True))
    assert found == pytest.approx(best_by_force(table, limits), rel=1e-7)


def test_a_limit_that_is_just_reached_is_met() -> None:
    counts = [999_983, 7, 123_457]
    costs = [[count * width for width in (2, 3)] for count in counts]
    for value in (sum(of[0] for of in costs), sum(of[0] for of in costs) + 7):
        places = allocate([[1.0, 0.0]] * 3, [Limit("bytes", value, costs)])
        assert places == [0, int(value > sum(of[0] for of in costs)), 0]


def measured(added: dict[str, list[float]], values: int = 100) -> list[Row]:
    """Return the measurements of layers whose NLL grows by these amounts from 8 bits down."""
    rows = [
        Row(layer, "weight", bits, values, values * bits // 8, 1.0 + more, 0.5 - more, 0.9)
        for layer, of in added.items()
        for bits, more in zip((8, 4, 2), [0.0, *of], strict=True)
    ]
    total = values * len(added)
    return [
        *rows,
        Row("", "all", 8, total, total + 40, 1.0, 0.5, 0.9),
        Row("", "float", 32, total, 4 * total, 0.9, 0.5, 0.9),
    ]


WIDTHS = (2, 4, 8)


@pytest.mark.parametrize("measure", ["nll", "mi"])
def test_an_insensitive_layer_gets_the_fewest_bits(measure: str) -> None:
    rows = measured({"a": [0.1, 0.5], "b": [0.0, 0.0], "c": [0.2, 0.9]})
    for mean, bits in ((8, (8, 8, 8)), (6, (8, 2, 8)), (4.7, (4, 2, 8)), (2, (2, 2, 2))):
        chosen = choose_bits(rows, Budget(mean_bits=mean, measure=measure, widths=WIDTHS))
        assert tuple(chosen.values()) == bits


def test_noise_in_a_measurement_is_no_gain() -> None:
    rows = measured({"a": [-0.2, 0.5], "b": [0.3, 0.1]})
    assert losses(rows, "nll") == {
        ("a", "weight"): {8: 0.0, 4: 0.0, 2: pytest.approx(0.5)},
        ("b", "weight"): {8: 0.0, 4: pytest.approx(0.3), 2: pytest.approx(0.3)},
    }


def test_bytes_count_scales_and_biases() -> None:
    rows = measured({"a": [0.1, 0.5], "b": [0.2, 0.9]})
    budget = Budget(bytes=40 + 100 + 50, widths=WIDTHS)
    assert choose_bits(rows, budget) == {("a", "weight"): 4, ("b", "weight"): 8}
    with pytest.raises(ArgumentError, match="bytes=89: the smallest that this network reaches with "
                       "the chosen widths is 90; raise it, or allow fewer bits"):  # fmt: skip
        choose_bits(rows, Budget(bytes=89, widths=WIDTHS))
    with pytest.raises(ArgumentError, match=r"^mean_bits=3.9: .* is 4;"):
        choose_bits(rows, Budget(mean_bits=3.9, widths=(4, 8)))


def test_activations_have_a_limit_of_their_own() -> None:
    rows = measured({"a": [0.1, 0.5]})
    for bits, more in ((8, 0.0), (4, 0.1), (2, 0.4)):
        rows += [Row(f"in{n}", "output", bits, n, 0, 1 + n * more) for n in (1, 3)]
    chosen = choose_bits(rows, Budget(mean_bits=8, mean_activation_bits=5.0, widths=WIDTHS))
    assert chosen == {("a", "weight"): 8, ("in1", "output"): 8, ("in3", "output"): 4}


def test_overrides_set_what_was_chosen_and_nothing_else() -> None:
    bits = {("a[0]", "mean"): 4, ("a[0]", "sigma"): 2, ("b", "output"): 5}
    spec = QuantSpec(overrides=overrides(bits))
    layer = spec.for_layer("a[0]")
    assert (layer.weight_bits, layer.sigma_bits, layer.activation_bits) == (4, 2, 7)
    assert spec.for_layer("b").activation_bits == 5
    assert spec.for_layer("a0") == QuantSpec()
