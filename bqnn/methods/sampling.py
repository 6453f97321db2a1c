"""SamplingPlan: the epochs in which chains start, explore, sample, and give members."""

import math
from dataclasses import dataclass

from bqnn.arguments import ArgumentError, real_number, whole_number


@dataclass(frozen=True)
class SamplingPlan:
    """When chains start, add noise, and give members. Times are in epochs.

    Attributes:
        burn_in: The length of the burn-in at the start of each chain.
        collect_every: The time between members.
        num_members: The number of members of all chains together.
        chain_epochs: The length of a chain; None for one chain.
        optimize_epochs: The time without noise at the start of each chain.
        cycle_epochs: The length of a cycle after burn-in; None for constant steps.
        exploration: The share of each cycle without noise, at its start.

    Raises:
        ValueError: A number is out of range, or a chain has no epoch after burn-in.

    Examples:
        >>> plan = SamplingPlan(burn_in=2, collect_every=1, num_members=4, chain_epochs=5)
        >>> plan.collected(max_epochs=10)
        [3, 4, 8, 9]
    """

    burn_in: int
    collect_every: int
    num_members: int
    chain_epochs: int | None = None
    optimize_epochs: int = 0
    cycle_epochs: int | None = None
    exploration: float = 0.8

    def __post_init__(self) -> None:
        whole_number("burn_in", self.burn_in, "in epochs, 0 or more", 0)
        whole_number("collect_every", self.collect_every, "in epochs, 1 or more", 1)
        whole_number("optimize_epochs", self.optimize_epochs, "in epochs, 0 or more", 0)
        for name in ("chain_epochs", "cycle_epochs"):
            value = getattr(self, name)
            if value is not None:
                whole_number(name, value, "in epochs, 1 or more", 1)
        reason = "the share of a cycle without noise, from 0 to below 1"
        real_number("exploration", self.exploration, reason, 0, 1, (1,))
        if self.chain_epochs is not None and self.burn_in + self.collect_every > self.chain_epochs:
            raise ArgumentError(
                f"chain_epochs={self.chain_epochs}: the first member of a chain comes after "
                f"{self.burn_in + self.collect_every} epochs (burn_in + collect_every); choose "
                "more",
                *("chain_epochs", "burn_in", "collect_every"),
            )

    def chain(self, epoch: int) -> int:
        """Return the number of the chain of an epoch."""
        return 0 if self.chain_epochs is None else epoch // self.chain_epochs

    def starts_chain(self, epoch: int) -> bool:
        """Return whether an epoch is the first one of a chain other than the first chain."""
        return epoch > 0 and self.chain(epoch) != self.chain(epoch - 1)

    def has_noise(self, time: float) -> bool:
        """Return whether steps have noise.

        Args:
            time: The time since the start of the training.
        """
        time = self._time_in_chain(time)
        return time >= self.optimize_epochs and self._cycle_share(time) >= self.exploration

    def step_share(self, time: float) -> float:
        """Return the step size as a share of that of the optimizer.

        Args:
            time: The time since the start of the training.
        """
        time = self._time_in_chain(time)
        if self.cycle_epochs is None or time < self.burn_in:
            return 1.0
        return math.cos(math.pi / 2 * self._cycle_share(time))  # whose square is (1 + cos) / 2

    def collected(self, max_epochs: int) -> list[int]:
        """Return the epochs at whose ends members are collected, in a training of this length.

        Several chains give equal numbers of members, their last ones.
        """
        if self.chain_epochs is None:
            return [epoch for epoch in range(max_epochs) if self._gives_member(epoch + 1)]
        starts = range(0, max_epochs, self.chain_epochs)
        share = max(1, self.num_members // max(1, len(starts)))
        epochs = []
        for start in starts:
            length = min(self.chain_epochs, max_epochs - start)
            chain = [start + done - 1 for done in range(1, length + 1) if self._gives_member(done)]
            epochs += chain[-share:]
        return epochs

    def _gives_member(self, done: int) -> bool:
        """Return whether a chain can give a member after this number of its epochs."""
        sampled = done - self.burn_in
        if sampled < 1:
            return False
        if self.cycle_epochs is None:
            return sampled % self.collect_every == 0
        left = -sampled % self.cycle_epochs  # epochs until the cycle ends
        is_sampling = self.cycle_epochs - left > self.exploration * self.cycle_epochs
        return is_sampling and left % self.collect_every == 0

    def _time_in_chain(self, time: float) -> float:
        return time if self.chain_epochs is None else time % self.chain_epochs

    def _cycle_share(self, time: float) -> float:
        """Return the elapsed share of the cycle; 1 in burn-in and without cycles."""
        if self.cycle_epochs is None or time < self.burn_in:
            return 1.0
        return (time - self.burn_in) % self.cycle_epochs / self.cycle_epochs
