"""Which examples of a step each process takes.

A step holds the examples that one process would take, in the same order, whatever the number of processes. They are
divided by what they cost, so that all processes finish together; none is left out and none is taken twice, so that a
process may have none in the last step of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler

from preftune.packing import share_out

Numbers = list[int]


class Shares(BatchSampler):
    """One process's share of every batch of a sampler.

    Args:
        batches: Yields the batches of all processes together, the same in each of them.
        costs: What each example costs, such as its tokens.
        share: This process's number and the number of processes.
        per_step: Batches that are divided together, those of an optimizer step.
        group: Examples that have to stay together; by default each goes by itself.
        agree: Makes batches that differ between processes the same ones in all.
        keep_empty: Yield a share without examples too, so that processes yield equally many.
    """

    def __init__(
        self,
        batches: Any,
        costs: Sequence[float],
        *,
        share: tuple[int, int],
        per_step: int = 1,
        group: int | None = None,
        agree: Callable[[list[Numbers]], list[Numbers]] | None = None,
        keep_empty: bool = True,
    ) -> None:
        # The names by which accelerate and transformers look for what they seed at the beginning of an epoch.
        self.batch_sampler = batches
        self.sampler = getattr(batches, "sampler", None)  # type: ignore[assignment]
        self.batch_size = getattr(batches, "batch_size", None)  # type: ignore[assignment]
        self.drop_last = bool(getattr(batches, "drop_last", False))
        self._costs = costs
        self._share = share
        self._per_step = per_step
        self._group = group
        self._agree = agree
        self._keep_empty = keep_empty

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Numbers]:
        batches = iter(self.batch_sampler if self._agree is None else self._agree(list(self.batch_sampler)))
        while step := list(islice(batches, self._per_step)):
            for numbers in share_of(step, self._costs, self._share, self._group):
                if numbers or self._keep_empty:
                    yield numbers

    def set_epoch(self, epoch: int) -> None:
        """Let the sampler draw the order of an epoch."""
        for each in (self.batch_sampler, self.sampler):
            if hasattr(each, "set_epoch"):
                each.set_epoch(epoch)


def share_of(
    step: Sequence[Numbers], costs: Sequence[float], share: tuple[int, int], group: int | None = None
) -> list[Numbers]:
    """One process's share of the batches of a step, in as many batches.

    Args:
        step: Example numbers, batch by batch.
        costs: What each example costs, by its number.
        share: This process's number and the number of processes.
        group: Examples that have to stay together; by default each goes by itself.
    """
    size = group or 1
    units = [batch[start : start + size] for batch in step for start in range(0, len(batch), size)]
    most = None if group is None else len(step)
    shared = share_out([sum(costs[number] for number in unit) for unit in units], share[1], most)
    mine = [units[place] for place in shared[share[0]]]
    if group is not None:
        return mine + [[] for _ in range(len(step) - len(mine))]
    numbers = [number for unit in mine for number in unit]
    each = -(-len(numbers) // len(step))
    return [numbers[place * each : (place + 1) * each] for place in range(len(step))]
