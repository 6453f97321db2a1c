"""Ensemble: copies of a network, collected while a sampler updates it."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.arguments import ArgumentError, whole_number
from bqnn.layers.draws import Drawn
from bqnn.layers.swap import check_copied_as_one, check_no_loose_tensors
from bqnn.text import counted


class Ensemble(Drawn):
    """A network and the last copies of it, its members.

    Training mode runs the current network. Evaluation mode runs a member: draw 0 is the newest
    member, draw 1 the one before it, and so on. Without a held draw, calls cycle through the
    members; two threads may then get the same member. Without members, evaluation mode runs the
    current network.

    Args:
        net: The current network, which the sampler updates.
        num_members: The largest number of members.

    Raises:
        TypeError: Copies of the network would not behave as the network, because parameters
            share memory or a module holds an unregistered tensor.

    Examples:
        >>> ensemble = Ensemble(nn.Linear(3, 2), num_members=5)
        >>> ensemble.collect()
        >>> ensemble.collect()
        >>> len(ensemble)
        2
        >>> ensemble.eval()(torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """

    collected: Tensor

    def __init__(self, net: nn.Module, num_members: int) -> None:
        super().__init__()
        check_no_loose_tensors(net)
        check_copied_as_one(net)
        self.current = net
        self.num_members = whole_number(
            "num_members", num_members, "an ensemble keeps at least one member", 1
        )
        self.members = nn.ModuleList()
        self.register_buffer("collected", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_make_room)
        self._turn = 0
        self._is_fixed = False  # True: a state has as many members as there are

    @classmethod
    def of(cls, nets: Sequence[nn.Module]) -> "Ensemble":
        """Make an ensemble of networks with equal layers.

        Args:
            nets: At least one network. Each becomes a member, the last one the newest. The current
                network is a copy of the last one, which is not trained.

        Raises:
            ValueError: The networks have different parameters or buffers.

        Examples:
            >>> ensemble = Ensemble.of([nn.Linear(3, 2) for _ in range(5)])
            >>> len(ensemble)
            5
        """
        ensemble = cls(copy.deepcopy(nets[-1]).requires_grad_(False), len(nets))
        shapes = _shapes(ensemble.current)
        if any(_shapes(net) != shapes for net in nets):
            raise ArgumentError("nets: their layers differ; pass copies with other weights", "nets")
        ensemble.members.extend(nets)
        ensemble.collected.fill_(len(nets))
        ensemble._is_fixed = True
        return ensemble

    def __len__(self) -> int:
        """Return the number of members."""
        return len(self.members)

    @torch.no_grad()
    def collect(self) -> None:
        """Add a copy of the current network. A full ensemble drops its oldest member."""
        slot = int(self.collected) % self.num_members
        if slot == len(self.members):
            self._add_member()
        self.members[slot].load_state_dict(self.current.state_dict())
        self.collected += 1

    @torch.no_grad()
    def follow(self) -> None:
        """Copy the newest member to the current network."""
        self.current.load_state_dict(self.members[self.make_draw(0)].state_dict())

    def make_draw(self, index: int) -> int:
        """Return the position of a member.

        Args:
            index: The number of the member, 0 for the newest.

        Raises:
            ValueError: There is no such member.
        """
        if self.members and index >= len(self.members):
            raise ValueError(
                f"draw {index} of an ensemble with {counted(len(self.members), 'member')}: "
                f"ask for at most {counted(len(self.members), 'sample')}"
            )
        newest = (int(self.collected) - 1) % self.num_members
        return (newest - index) % max(len(self.members), 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not self.members:
            return self.current(x)
        return self._member()(x)

    # The choice of a member must not become a constant of a compiled graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _member(self) -> nn.Module:
        place = self.held()
        if place is None:
            self._turn = place = (self._turn + 1) % len(self.members)
        return self.members[place]

    def _add_member(self) -> None:
        member = copy.deepcopy(self.current).requires_grad_(False)
        self.members.append(member.train(self.training))


def _make_room(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Match the number of members to a state that is about to be loaded.

    Raises:
        RuntimeError: A tensor is missing or has another shape. No member is created then.
    """
    assert isinstance(module, Ensemble)
    count = min(_collected(state, prefix), module.num_members)
    if module._is_fixed and count < module.num_members:
        raise RuntimeError(
            f"{prefix}collected={count} members, but the ensemble has {module.num_members}; the "
            "file is damaged, save it again"
        )
    current = module.current.state_dict()
    shapes = {name: value.shape for name, value in module.current.named_parameters()}
    for index, name in itertools.product(range(count), current):
        found = state.get(f"{prefix}members.{index}.{name}")
        # Only parameters are compared: observers' buffers change shape with their first data.
        if found is None or found.shape != shapes.get(name, found.shape):
            raise RuntimeError(
                f"{prefix}collected={count} members, but the state lacks some of their tensors; "
                "the file is damaged, save it again"
            )
    while len(module.members) < count:
        module._add_member()
    del module.members[count:]


def _shapes(net: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in net.state_dict().items()}


def _collected(state: dict[str, Any], prefix: str) -> int:
    collected = state.get(f"{prefix}collected")
    if collected is None:
        return 0
    if collected.numel() != 1 or collected.dtype != torch.int64 or collected.item() < 0:
        raise RuntimeError(
            f"{prefix}collected is not a number of members; the file is damaged, save it again"
        )
    return int(collected)
