"""A budget of bits: the width of each tensor with the least loss within limits on the size.

The loss of a network is taken as the sum of the losses of its tensors, each measured alone (see
`bqnn.evaluation.sensitivity`). Choosing one width for each tensor is then a multiple-choice
knapsack problem, which is solved exactly.
"""

import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from bqnn.arguments import ArgumentError

FULL = 8  # the width of all other tensors while one is measured
WIDTHS = tuple(range(2, FULL + 1))
OUTPUT = "output"  # the tensor of activations; `weight`, `mean` and `sigma` are stored


@dataclass(frozen=True)
class Row:
    """A measurement with one tensor at a width and all others at 8 bits.

    Attributes:
        layer: The name of the layer or marker; empty for the whole network.
        tensor: `weight`, `mean`, `sigma` or `output`; for the whole network, `float` or `all`.
        bits: The width.
        values: The number of values: stored ones of all members, or activations of one row.
        bytes: Their packed size; for the whole network, with scales, zero points and biases. 0 for
            activations.
        nll: The negative log-likelihood, in nats per row.
        mi: The mutual information in nats per row; None for a regression.
        auroc: The AUROC on the other set; None if it was not measured.
        kl: The divergence of the predictive distribution from that of the float network, in nats
            per row.
    """

    layer: str
    tensor: str
    bits: int
    values: int
    bytes: int
    nll: float
    mi: float | None = None
    auroc: float | None = None
    kl: float = 0.0


@dataclass(frozen=True)
class Budget:
    """Limits on the bits of a network, and what is kept within them. None sets no limit.

    Args:
        bytes: Of the packed parameters, as in size.json.
        mean_bits: Mean over all stored weights; mu and sigma count as two.
        mean_activation_bits: Mean over the activations of one row, except for the outputs.
        measure: The loss: `nll`, `kl`, the distance of `mi` from that of the float network, or
            the loss of `auroc`.
        widths: The widths to choose from.

    Examples:
        >>> full = Row("", "all", 8, 200, 250, nll=0.5)
        >>> rows = [
        ...     Row("", "float", 32, 200, 800, nll=0.5), full,
        ...     Row("a", "weight", 8, 100, 100, nll=0.5), Row("a", "weight", 4, 100, 50, nll=0.9),
        ...     Row("b", "weight", 8, 100, 100, nll=0.5), Row("b", "weight", 4, 100, 50, nll=0.6),
        ... ]
        >>> choose_bits(rows, Budget(bytes=200, widths=(4, 8)))
        {('a', 'weight'): 8, ('b', 'weight'): 4}
    """

    bytes: int | None = None
    mean_bits: float | None = None
    mean_activation_bits: float | None = None
    measure: str = "nll"
    widths: tuple[int, ...] = WIDTHS

    @property
    def limits_weights(self) -> bool:
        """Whether the bits of weights are chosen."""
        return self.bytes is not None or self.mean_bits is not None


Bits = dict[tuple[str, str], int]  # of each layer and tensor


def choose_bits(rows: Sequence[Row], budget: Budget) -> Bits:
    """Choose the width of each measured tensor with the least sum of losses within a budget.

    A loss is the increase over that at 8 bits. It never falls with fewer bits: where a measurement
    does, the largest loss at more bits takes its place. Of equal losses, more bits win.

    Args:
        rows: The measurements, with those of the whole network.
        budget: The limits.

    Returns:
        The width of each layer and tensor.

    Raises:
        ArgumentError: No choice of widths is within a limit, or the network has no mutual
            information.
    """
    tensors, _, full = _by_tensor(rows)
    found = losses(rows, budget.measure)
    tie = 1e-6 * max((max(of.values()) for of in found.values()), default=0.0) or 1.0
    widths = sorted(set(budget.widths))
    places = allocate(
        [[of[bits] + tie * (FULL - bits) for bits in widths] for of in found.values()],
        _limits(budget, [*tensors.values()], widths, full),
    )
    return {key: widths[place] for key, place in zip(tensors, places, strict=True)}


def losses(rows: Iterable[Row], measure: str) -> dict[tuple[str, str], dict[int, float]]:
    """Return the loss of each tensor at each width over that at 8 bits, by falling width.

    It never falls with fewer bits.

    Args:
        rows: The measurements, with those of the whole network.
        measure: `nll`, `kl`, `mi` or `auroc`.
    """
    tensors, reference, _ = _by_tensor(rows)

    def loss(row: Row) -> float:
        if measure in ("nll", "kl"):
            return row.nll if measure == "nll" else row.kl
        if measure == "auroc":
            assert row.auroc is not None
            return -row.auroc
        assert row.mi is not None
        assert reference.mi is not None
        return abs(row.mi - reference.mi)

    made = {}
    for key, of in tensors.items():
        widths = sorted(of, reverse=True)
        increases = (max(0.0, loss(of[bits]) - loss(of[FULL])) for bits in widths)
        made[key] = dict(zip(widths, accumulate(increases, max), strict=True))
    return made


@dataclass(frozen=True)
class Limit:
    """A limit on (offset + the sum of the costs) / divisor.

    Attributes:
        name: The name of the limit.
        value: The limit.
        costs: The cost of each option of each item, whole numbers.
        offset: What is added to all sums.
        divisor: What they are divided by.
    """

    name: str
    value: float
    costs: Sequence[Sequence[int]]
    offset: int = 0
    divisor: int = 1

    def reached(self, places: Sequence[int]) -> float:
        """Return the value at a choice of one option for each item."""
        total = sum(of[place] for of, place in zip(self.costs, places, strict=True))
        return (self.offset + total) / self.divisor


def allocate(losses: Sequence[Sequence[float]], limits: Sequence[Limit]) -> list[int]:
    """Choose one option of each item with the least sum of losses within limits, exactly.

    Args:
        losses: The loss of each option of each item, 0 or more.
        limits: Limits on the sums of costs. In each item, one option has the least cost in all.

    Returns:
        The index of the chosen option of each item.

    Raises:
        ArgumentError: The options of least cost are above a limit.

    Examples:
        >>> allocate([[0.5, 0.0], [0.2, 0.0]], [Limit("bytes", 3, [[1, 2], [1, 2]])])
        [1, 0]
    """

    for limit in limits:
        least = limit.reached(_least(limit))
        if least > limit.value:
            raise ArgumentError(
                f"{limit.name}={limit.value:.10g}: the smallest that this network reaches with the "
                f"chosen widths is {least:.10g}; raise it, or allow fewer bits",
                limit.name,
            )
    allowed = [limit.value for limit in limits]
    while True:
        places = _solve(losses, limits, allowed)
        if places is None:  # only the options of least cost are within the limits
            return _least(limits[0])
        above = [max(limit.reached(places) - limit.value, 0) for limit in limits]
        if not any(above):
            return places
        # The tolerance of the solver let a sum pass.
        allowed = [most - over for most, over in zip(allowed, above, strict=True)]


def _least(limit: Limit) -> list[int]:
    return [of.index(min(of)) for of in limit.costs]


def _solve(
    losses: Sequence[Sequence[float]], limits: Sequence[Limit], allowed: Sequence[float]
) -> list[int] | None:
    """Solve the integer program with limits lowered to `allowed`; None if nothing is within."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    counts = [len(of) for of in losses]
    item = np.repeat(np.arange(len(counts)), counts)
    constraints = [LinearConstraint((item == np.arange(len(counts))[:, None]).astype(float), 1, 1)]
    for limit, most in zip(limits, allowed, strict=True):
        scale = limit.divisor * most  # the tolerance is absolute
        costs = np.concatenate(limit.costs)
        constraints.append(LinearConstraint(costs / scale, ub=1 - limit.offset / scale))
    # The solver stops within 1e-6 of the best sum.
    objective = np.concatenate(losses)
    objective = 1e4 * objective / (objective.max() or 1)
    found = milp(
        objective,
        integrality=np.ones_like(objective),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        return None
    return [int(found.x[item == number].argmax()) for number in range(len(counts))]


def overrides(bits: Bits) -> list[dict[str, Any]]:
    """Return the overrides of a `QuantSpec` that set these widths.

    Examples:
        >>> overrides({("a", "mean"): 4, ("a", "sigma"): 3, ("a", "output"): 6})
        [{'layer': 'a', 'weight_bits': 4, 'sigma_bits': 3, 'activation_bits': 6}]
    """
    made: dict[str, dict[str, Any]] = {}
    for (layer, tensor), width in bits.items():
        entry = made.setdefault(layer, {"layer": glob.escape(layer)})
        entry[OVERRIDDEN[tensor]] = width
    return list(made.values())


OVERRIDDEN = {
    "weight": "weight_bits",
    "mean": "weight_bits",
    "sigma": "sigma_bits",
    OUTPUT: "activation_bits",
}


def _by_tensor(
    rows: Iterable[Row],
) -> tuple[dict[tuple[str, str], dict[int, Row]], Row, Row]:
    """Group rows by tensor and width, and return those of the network in float and at 8 bits."""
    tensors: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        tensors.setdefault((row.layer, row.tensor), {})[row.bits] = row
    (reference,), (full,) = (tensors.pop(("", name)).values() for name in ("float", "all"))
    return tensors, reference, full


def _limits(
    budget: Budget, tensors: Sequence[Mapping[int, Row]], widths: Sequence[int], full: Row
) -> list[Limit]:
    """Return the limits of a budget on the widths of each tensor."""
    at_full = [of[FULL] for of in tensors]

    def limit(name: str, cost: Callable[[Row], int], offset: int, divisor: int) -> Limit | None:
        value = getattr(budget, name)
        costs = [[cost(of[bits]) for bits in widths] for of in tensors]
        return None if value is None else Limit(name, value, costs, offset, divisor)

    def mean(name: str, is_counted: Callable[[Row], bool]) -> Limit | None:
        count = sum(row.values for row in at_full if is_counted(row))
        return limit(name, lambda row: row.bits * row.values * is_counted(row), 0, count)

    made = (
        limit("bytes", lambda row: row.bytes, full.bytes - sum(row.bytes for row in at_full), 1),
        mean("mean_bits", lambda row: row.tensor != OUTPUT),
        mean("mean_activation_bits", lambda row: row.tensor == OUTPUT),
    )
    return [each for each in made if each is not None]
