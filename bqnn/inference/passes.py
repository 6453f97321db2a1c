"""Forward passes of a set of rows, of which some may be left out of later draws."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from bqnn.arguments import ArgumentTypeError
from bqnn.layers.chain import is_chain
from bqnn.layers.draws import DrawnWeights, Stochastic, held_rows
from bqnn.layers.ensemble import Ensemble

MIN_ROWS = 16  # a matrix product of fewer rows rounds otherwise than one of a full batch


class Passes:
    """The passes of a network over batches of rows, one for each draw.

    Args:
        net: The network, in evaluation mode.
        batches: The N rows, of which there is at least one batch.
        num_samples: The largest number of draws S.
        prepare: Converts the rows of a batch to inputs; None for the identity.
        room: The number of bytes of activations that may be kept between draws.

    Attributes:
        has_masks: Whether passes draw random numbers, as MC dropout does.
        has_open_rows: Whether any row needs more draws; True if there are no rows.
    """

    def __init__(
        self,
        net: nn.Module,
        batches: Sequence[Tensor],
        num_samples: int,
        prepare: Callable[[Tensor], Tensor] | None,
        room: int,
    ) -> None:
        self._batches = batches
        self._prepare = prepare
        self._room = room
        self._leading, self._rest = _split_at_first_random(net)
        self.has_masks = any(
            isinstance(module, Stochastic) and not isinstance(module, DrawnWeights | Ensemble)
            for module in net.modules()
        )
        self._rows: list[Tensor | None] = [None] * len(batches)  # of each batch; None for all
        self._kept: list[Tensor] | None = None
        self._draws: list[Tensor] = []  # [N, ...], NaN where a row was left out
        self._num_samples = torch.full((sum(map(len, batches)),), num_samples)
        self._is_open = torch.ones(len(self._num_samples), dtype=torch.bool)
        self.has_open_rows = True

    def run(self) -> None:
        """Compute the outputs of all rows that are left, for the draw that the thread holds."""
        if not self.has_open_rows:
            return
        output_of, outputs = self._outputs(), []
        for place, (batch, rows) in enumerate(zip(self._batches, self._rows, strict=True)):
            if rows is None:
                outputs.append(_tensor(output_of(place)))
            elif len(rows) > 0:
                with held_rows(rows, len(batch)):
                    outputs.append(_tensor(output_of(place)))
        draw = torch.cat(outputs)
        if any(rows is not None for rows in self._rows):
            some, draw = draw, draw.new_full((len(self._is_open), *draw.shape[1:]), torch.nan)
            draw[self._places().to(draw.device)] = some
        self._draws.append(draw)

    def drop_settled(self, is_settled: Callable[[Tensor], Tensor]) -> None:
        """Leave out the rows that have settled.

        Args:
            is_settled: Judges the draws so far [n, B, ...] of B rows; returns booleans [B].
        """
        judged = self._is_open.nonzero()[:, 0]
        if len(judged) == 0:
            return
        draws = torch.stack([draw[judged.to(draw.device)] for draw in self._draws])
        settled = judged[is_settled(draws).cpu()]
        if len(settled) == 0:
            return
        self._num_samples[settled] = len(draws)
        self._is_open[settled] = False
        self.has_open_rows = bool(self._is_open.any())
        open_by_batch = self._is_open.split([len(batch) for batch in self._batches])
        self._rows = [_rows_left(is_open) for is_open in open_by_batch]
        if self.has_masks:  # a batch draws its masks as long as a later one needs its own
            last = max((i for i, is_open in enumerate(open_by_batch) if is_open.any()), default=0)
            for place, rows in enumerate(self._rows[:last]):
                if rows is not None and len(rows) == 0:
                    self._rows[place] = torch.zeros(1, dtype=torch.int64)
        self._kept = None

    def results(self) -> tuple[Tensor, Tensor]:
        """Return draws [S, N, ...] and the number of each row [N].

        S is the largest number of draws that a row made; those that a row did not make are NaN.
        """
        draws = torch.stack(self._draws)
        is_made = torch.arange(len(draws))[:, None] < self._num_samples
        if not is_made.all():
            draws[~is_made.to(draws.device)] = torch.nan
        return draws, self._num_samples

    def _places(self) -> Tensor:
        """Return the indices of all rows that are left."""
        places, start = [], 0
        for batch, rows in zip(self._batches, self._rows, strict=True):
            places.append(start + (torch.arange(len(batch)) if rows is None else rows))
            start += len(batch)
        return torch.cat(places)

    def _outputs(self) -> Callable[[int], object]:
        """Return a function of the index of a batch, which computes its output."""
        if self._room > 0 and len(self._leading) > 0:
            if self._kept is None:
                self._keep()
            if self._kept:
                kept = self._kept
                return lambda place: self._rest(kept[place])
        return lambda place: self._rest(self._leading(self._prepared(place)))

    def _keep(self) -> None:
        """Keep the activations before the first random layer, if there is room for them."""
        places = [place for place, rows in enumerate(self._rows) if rows is None or len(rows) > 0]
        first = self._leading(self._prepared(places[0]))
        if len(self._batches) * first.numel() * first.element_size() > self._room:
            self._room = 0
            return
        self._kept = [first] * len(self._batches)
        for place in places[1:]:
            self._kept[place] = self._leading(self._prepared(place))

    def _prepared(self, place: int) -> Tensor:
        batch, rows = self._batches[place], self._rows[place]
        batch = batch if rows is None else batch[rows.to(batch.device)]
        return batch if self._prepare is None else self._prepare(batch)


def _rows_left(is_open: Tensor) -> Tensor | None:
    """Return the rows of a batch to compute: the open ones, and others up to `MIN_ROWS`.

    Returns:
        Indices; None for all rows of the batch.
    """
    count = int(is_open.sum())
    if count == 0:
        return torch.zeros(0, dtype=torch.int64)
    if max(count, MIN_ROWS) >= len(is_open):
        return None
    first = is_open.to(torch.int8).argsort(descending=True, stable=True)  # the open ones first
    return first[: max(count, MIN_ROWS)].sort().values


def _tensor(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise ArgumentTypeError(
            f"net: its forward returns a {type(output).__name__}, and draws are stacked from "
            "tensors; wrap it in a module that returns one tensor",
            "net",
        )
    return output


def _split_at_first_random(net: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """Split nested Sequentials before their first random module."""
    steps = list(_steps(net))
    for index, step in enumerate(steps):
        if any(isinstance(module, Stochastic) for module in step.modules()):
            return nn.Sequential(*steps[:index]), nn.Sequential(*steps[index:])
    return nn.Sequential(), nn.Sequential(*steps)


def _steps(net: nn.Module) -> Iterator[nn.Module]:
    if is_chain(net):
        for child in net.children():
            yield from _steps(child)
    else:
        yield net
