"""What each process takes of a step: all of it together, nothing twice, and about equally much."""

from __future__ import annotations

import random

import pytest
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from preftune.packing import share_out
from preftune.training.balancing import Numbers, Shares


def shares(rows: int, number: int, *, batch: int, per_step: int = 1, group: int | None = None) -> list[list[Numbers]]:
    """What the loaders of all processes read, batch by batch."""
    costs = [random.Random(n).randint(1, 50) for n in range(rows)]
    found = []
    for rank in range(number):
        batches = BatchSampler(SequentialSampler(range(rows)), batch * number, drop_last=False)
        mine = Shares(batches, costs, share=(rank, number), per_step=per_step, group=group)
        assert len(mine) == len(list(mine))
        found.append(list(mine))
    return found


@pytest.mark.parametrize("rows", [1, 7, 37, 51, 64])
@pytest.mark.parametrize("number", [2, 3, 8])
@pytest.mark.parametrize("group", [None, 2])
def test_steps_are_those_of_one_process(rows: int, number: int, group: int | None) -> None:
    together = shares(rows, number, batch=2, per_step=3, group=group)
    assert len({len(each) for each in together}) == 1
    for start in range(0, len(together[0]), 3):
        step = sorted(n for each in together for numbers in each[start : start + 3] for n in numbers)
        first = start * 2 * number
        assert step == list(range(first, min(first + 6 * number, rows)))


def test_what_belongs_together_stays_together() -> None:
    for each in shares(50, 4, batch=3, per_step=2, group=3):
        for numbers in each:
            assert not numbers or (numbers[0] % 3 == 0 and numbers == list(range(numbers[0], min(numbers[0] + 3, 50))))


def test_processes_have_equally_much_to_do() -> None:
    """Token counts as skewed as those of real dialogues, eight pairs for each of eight processes."""
    draw = random.Random(0)
    worst = []
    for _ in range(50):
        costs = [int(draw.lognormvariate(5.2, 0.8)) + 10 for _ in range(64)]
        loads = [sum(costs[n] for n in share) for share in share_out(costs, 8)]
        worst.append(max(loads) / (sum(loads) / 8))
    assert sum(worst) / len(worst) < 1.05


def test_no_more_than_what_is_allowed() -> None:
    found = share_out([9, 1, 1, 1, 1, 1], 2, most=3)
    assert sorted(map(len, found)) == [3, 3]
    assert sorted(n for share in found for n in share) == list(range(6))


def test_an_epoch_is_drawn_anew_and_differing_orders_are_agreed_on() -> None:
    sampler = RandomSampler(range(10))
    said: list[list[Numbers]] = []

    def agree(batches: list[Numbers]) -> list[Numbers]:
        said.append(batches)
        return [[4, 5], [6, 7]]

    mine = Shares(BatchSampler(sampler, 4, False), [1] * 10, share=(1, 2), agree=agree)
    assert list(mine) == [[5], [7]]
    assert sorted(n for batch in said[0] for n in batch) == list(range(10))


def test_evaluations_leave_empty_shares_out() -> None:
    batches = BatchSampler(SequentialSampler(range(5)), 4, False)
    assert list(Shares(batches, [1] * 5, share=(0, 2), keep_empty=False)) == [[0, 2], [4]]
    assert list(Shares(batches, [1] * 5, share=(1, 2), keep_empty=False)) == [[1, 3]]
