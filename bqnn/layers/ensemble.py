"""An ensemble of networks of one shape, collected while a chain samples one of them."""

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.arguments import whole_number
from bqnn.layers.draws import Drawn
from bqnn.layers.swap import check_copied_as_one, check_no_loose_tensors


class Ensemble(Drawn):
    """The network that is being sampled, and the last `num_members` copies taken of it.

    In training the current network answers. In evaluation draw number 0 is the newest member,
    draw number 1 the one before it and so on, and outside a held draw the members take
    turns (of two threads at once, both may get the same one); as long as there is none, the
    current network answers.
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

    def __len__(self) -> int:
        """How many members there are to draw from."""
        return len(self.members)

    @torch.no_grad()
    def collect(self) -> None:
        """Copy the current network into the ensemble. A full ensemble drops its oldest member."""
        slot = int(self.collected) % self.num_members
        if slot == len(self.members):
            self._add_member()
        self.members[slot].load_state_dict(self.current.state_dict())
        self.collected += 1

    def make_draw(self, index: int) -> int:
        """Return the position of member number `index`, counted from the newest."""
        if self.members and index >= len(self.members):
            raise ValueError(
                f"draw {index} of an ensemble with {len(self.members)} members: "
                f"ask for at most {len(self.members)} samples"
            )
        newest = (int(self.collected) - 1) % self.num_members
        return (newest - index) % max(len(self.members), 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not self.members:
            return self.current(x)
        return self._member()(x)

    # Which member answers is not a part of any graph.
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
    """Give the ensemble as many members as the state that is about to be loaded.

    RuntimeError, before any is made: the state does not have all tensors of that many, in the
    shapes of the current network's.
    """
    assert isinstance(module, Ensemble)
    count = min(_collected(state, prefix), module.num_members)
    current = module.current.state_dict()
    shapes = {name: value.shape for name, value in module.current.named_parameters()}
    for index, name in itertools.product(range(count), current):
        found = state.get(f"{prefix}members.{index}.{name}")
        # Buffers of observers have other shapes before they have seen data.
        if found is None or found.shape != shapes.get(name, found.shape):
            raise RuntimeError(f"{prefix}collected says {count} members, but not all are there")
    while len(module.members) < count:
        module._add_member()
    del module.members[count:]


def _collected(state: dict[str, Any], prefix: str) -> int:
    collected = state.get(f"{prefix}collected")
    if collected is None:
        return 0
    if collected.numel() != 1 or collected.dtype != torch.int64 or collected.item() < 0:
        raise RuntimeError(f"{prefix}collected is no count of members")
    return int(collected)
