"""How processes divide a reference pass: by tokens, and in step where the model is sharded."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from datasets import Dataset

from preftune.kernels.head import TokenScores
from preftune.packing import PackedRow, plan_rows
from preftune.references.store import ReferenceStore
from preftune.terminal.progress import Progress
from preftune.training.lengths import pair_lengths
from preftune.training.reference import Reference

Sums = npt.NDArray[np.float64]


class Packing:
    packed = True
    alone = False

    def rows_of(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        return plan_rows(lengths, max_tokens)


def pairs_of(number: int) -> Dataset:
    """Pairs whose lengths are as skewed as those of real dialogues."""
    draw = random.Random(0)
    made = []
    for n in range(number):
        prompt, *answers = (int(draw.lognormvariate(4, 0.9)) + 1 for _ in range(3))
        chosen, rejected = ([n % 7 + k] * length for k, length in enumerate(answers))
        made.append({"prompt_ids": [n + 1] * prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return Dataset.from_list(made)


class Rank(Reference):
    """The reference of one process, which notes the rows that it runs."""

    def __init__(self, store: ReferenceStore | None = None) -> None:
        super().__init__(Packing(), nullcontext, store=store, show_progress=False)  # type: ignore[arg-type]
        self._key = "0" * 64
        self.rows: list[int] = []

    def row_scores(self, row: PackedRow, *, with_tail: bool = False) -> TokenScores:
        self.rows.append(row.num_tokens)
        # What a token is and where: the same for whoever scores it.
        values = torch.from_numpy(row.target_ids + row.position_ids[row.source] / 1000)
        return TokenScores(logps=values)


def passed(ranks: Sequence[Rank], pairs: Dataset, *, in_step: bool) -> list[Sums]:
    """Run a pass of several processes, which are threads here."""
    number = len(ranks)
    said: list[Any] = [None] * number
    barrier = threading.Barrier(number, timeout=30)
    lengths = pair_lengths(pairs)
    assert lengths is not None
    costs = lengths.row

    def run(index: int) -> Sums:
        def gathered(value: Any) -> list[Any]:
            said[index] = value
            barrier.wait()
            found = list(said)
            barrier.wait()
            return found

        return ranks[index].sums(
            pairs,
            range(len(pairs)),
            max_tokens=400,
            costs=costs,
            share=(index, number),
            joined=lambda mine: np.add.reduce(gathered(mine)),
            in_step=(lambda rows: max(gathered(rows))) if in_step else None,
        )

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("number", [2, 3, 8])
def test_processes_have_equally_much_to_score_and_find_the_same(number: int, in_step: bool) -> None:
    pairs = pairs_of(200)
    alone = Rank()
    expected = alone.sums(pairs, range(200), max_tokens=400)
    ranks = [Rank() for _ in range(number)]
    for found in passed(ranks, pairs, in_step=in_step):
        assert np.array_equal(found, expected)
    if in_step:
        assert len({len(rank.rows) for rank in ranks}) == 1
    else:
        assert sum(sum(rank.rows) for rank in ranks) == sum(alone.rows)
        assert max(sum(rank.rows) for rank in ranks) <= 1.1 * sum(alone.rows) / number


@pytest.mark.parametrize("in_step", [False, True])
def test_chunks_follow_one_another(in_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one leaves processes without a pair."""
    monkeypatch.setattr("preftune.training.reference.ITEMS_PER_CHUNK", 8)
    pairs = pairs_of(49)
    expected = Rank().sums(pairs, range(49), max_tokens=400)
    for found in passed([Rank() for _ in range(3)], pairs, in_step=in_step):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("number", [1, 3])
def test_the_bar_moves_with_every_row_and_ends_full(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single chunk may take an hour."""
    moves: list[list[int]] = []

    class Watched(Progress):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            moves.append([])
            monkeypatch.setattr(self._bar, "update", moves[-1].append)

    monkeypatch.setattr("preftune.training.reference.Progress", Watched)
    passed([Rank() for _ in range(number)], pairs_of(49), in_step=False)
    assert len(moves) == number
    for own in moves:
        assert sum(own) == 49
        assert min(own) >= 0
        assert max(own) < 49 / 2


def test_a_process_without_a_pair_stays_in_step() -> None:
    pairs, ranks = pairs_of(2), [Rank() for _ in range(3)]
    found = passed(ranks, pairs, in_step=True)
    assert [len(rank.rows) for rank in ranks] == [1, 1, 1]
    assert np.array_equal(found[2], Rank().sums(pairs, range(2), max_tokens=400))


@pytest.mark.parametrize("in_step", [False, True])
def test_only_what_no_store_has_is_scored(in_step: bool, tmp_path: Path) -> None:
    """Two machines, each with a store of its own, of which one has lost what it had."""
    pairs, homes = pairs_of(40), [tmp_path / "a", tmp_path / "b"]
    first = [Rank(ReferenceStore(home)) for home in homes]
    expected = passed(first, pairs, in_step=in_step)[0]
    again = [Rank(ReferenceStore(home)) for home in (homes[0], tmp_path / "c")]
    assert all(np.array_equal(found, expected) for found in passed(again, pairs, in_step=in_step))
    assert again[1].rows == first[1].rows
    # Rows of a sharded model are run by all or by none.
    assert len(again[0].rows) == (len(first[1].rows) if in_step else 0)
    known = [Rank(ReferenceStore(home)) for home in homes]
    assert all(np.array_equal(found, expected) for found in passed(known, pairs, in_step=in_step))
    assert [rank.rows for rank in known] == [[], []]
