"""Masks of MC dropout that a file draws itself, with ONNX's own operator for random numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from bqnn.layers.dropout import MCDropout
from bqnn.quant.onnx.graph import TYPES, Graph, Port
from bqnn.quant.onnx.network import Form, NetworkWriter
from bqnn.seeds import Stream, stream_seed

NUM_SEEDS = 2**24  # ONNX stores seeds in float32
SEED_STEP = 10_368_889  # about NUM_SEEDS times the golden ratio, and odd, so that no seed returns
LARGEST_SCORE = 6.0  # by chance, a standard normal number is larger once in 500 million


class RandomMasks(NetworkWriter):
    """Writes masks of MC dropout as random numbers of the runtime: each row has its own mask.

    Args:
        graph: The graph to write into.
        form: The form of the modules in integers.
        seed: The seed of the run.

    Attributes:
        masks: The masks of all draws, in the order of the calls of MC dropout.
        rates: Their dropout rates.
    """

    def __init__(self, graph: Graph, form: Form, seed: int) -> None:
        super().__init__(graph, form)
        self.masks: list[Port] = []
        self.rates: list[float] = []
        self._seed = stream_seed(seed, Stream.EVALUATION_MASKS)

    def kept(self, module: MCDropout, example: Tensor) -> tuple[str, Tensor]:
        graph, all_kept = self.graph, module.kept_like(example)
        sizes = all_kept.shape[1:]
        rows = graph.call("Shape", "inputs", start=0, end=1)
        shape = graph.call("Concat", rows, graph.constant(np.array(sizes, np.int64)), axis=0)
        zeros = graph.call("ConstantOfShape", shape)
        # Runtimes can have simple generators, whose streams are similar for neighboring seeds.
        seed = float((self._seed + SEED_STEP * len(self.masks)) % NUM_SEEDS)
        numbers = graph.call("RandomUniformLike", zeros, dtype=TYPES["float32"], seed=seed)
        rate = graph.constant(np.float32(module.rate))
        name = graph.call("GreaterOrEqual", numbers, rate)
        self.masks.append(Port(name, np.dtype(bool), ("N", *sizes)))
        self.rates.append(module.rate)
        return name, all_kept


@dataclass
class MaskStatistics:
    """How random masks are: counts of events whose probabilities are known.

    Attributes:
        rates: The dropout rates of the masks of all draws.
        num_samples: The number of draws S.
        counts: For each kind of event, how often it occurred, how often it was expected, and the
            variance of this number.

    Examples:
        >>> import torch
        >>> statistics = MaskStatistics([0.5, 0.5], num_samples=2)
        >>> coins = torch.rand(2, 1000, 100, generator=torch.Generator().manual_seed(0)) < 0.5
        >>> statistics.add(list(coins))
        >>> all(abs(score) < 4 for score in statistics.scores.values())
        True
        >>> statistics.add([coins[0], coins[0]])  # two draws with equal masks
        >>> statistics.scores["equal_in_two_draws"] > 100
        True
    """

    rates: Sequence[float]
    num_samples: int
    counts: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def add(self, masks: Sequence[Tensor]) -> None:
        """Count events in the masks of all draws for a batch.

        Args:
            masks: Booleans [N, ...], True for kept values, in the order of `rates`.
        """
        per_draw = len(masks) // self.num_samples
        for place, (mask, rate) in enumerate(zip(masks, self.rates, strict=True)):
            equal = rate**2 + (1 - rate) ** 2
            even = len(mask) // 2 * 2
            self._count("kept", mask, 1 - rate)
            self._count("equal_in_two_rows", mask[:even:2] == mask[1:even:2], equal)
            if place // per_draw % 2 == 1:
                self._count("equal_in_two_draws", mask == masks[place - per_draw], equal)

    @property
    def scores(self) -> dict[str, float]:
        """The standard score of each kind of event, standard normal for independent masks."""
        return {
            kind: (found - expected) / variance**0.5
            for kind, (found, expected, variance) in self.counts.items()
            if variance > 0
        }

    def record(self) -> dict[str, dict[str, float]]:
        """Return what verification.json has about random masks."""
        return {
            kind: {"found": found, "expected": expected, "standard_score": self.scores[kind]}
            for kind, (found, expected, _) in self.counts.items()
            if kind in self.scores
        }

    def require_random(self) -> None:
        """Raise a ValueError if the counts are not those of independent masks."""
        for kind, (found, expected, variance) in self.counts.items():
            # The second summand is for rare events, whose numbers are not normal.
            if not abs(found - expected) < LARGEST_SCORE * (variance**0.5 + 1):
                raise ValueError(
                    f"model.onnx: of the values of its random masks, {found:.0f} are "
                    f"{kind.replace('_', ' ')}, and {expected:.0f} are expected: this runtime does "
                    "not draw independent numbers; use masks=fixed"
                )

    def _count(self, kind: str, events: Tensor, probability: float) -> None:
        old = self.counts.get(kind, (0.0, 0.0, 0.0))
        expected = events.numel() * probability
        new = (float(events.sum()), expected, expected * (1 - probability))
        self.counts[kind] = (old[0] + new[0], old[1] + new[1], old[2] + new[2])
