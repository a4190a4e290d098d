"""How processes divide a reference pass: by tokens, and in step where the model is sharded."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from preftune.kernels.head import TokenScores
from preftune.packing import PackedRow, plan_rows
from preftune.references.scoring import Item, SequenceScorer


class Packing:
    packed = True
    alone = False

    def rows_of(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        return plan_rows(lengths, max_tokens)


def items(number: int) -> list[Item]:
    """Pairs whose lengths are as skewed as those of real dialogues."""
    draw = random.Random(0)
    made: list[Item] = []
    for n in range(number):
        prompt, *answers = (int(draw.lognormvariate(4, 0.9)) + 1 for _ in range(3))
        ids = np.full(prompt, n + 1, dtype=np.int64)
        made.append([(ids, np.full(length, k, dtype=np.int64)) for k, length in enumerate(answers)])
    return made


class Rank:
    """One process of a pass, which notes the rows that it runs."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.scorer = SequenceScorer(self.score, Packing)

    def score(self, row: PackedRow, tail: bool) -> TokenScores:
        self.rows.append(row.num_tokens)
        # What a token is and where: the same for whoever scores it.
        values = torch.from_numpy(row.target_ids + row.position_ids[row.source] / 1000)
        return TokenScores(logps=values)


def scored(number: int, pairs: list[Item], *, in_step: bool) -> tuple[list[Rank], list[Any]]:
    """Run a pass of several processes, which are threads here."""
    ranks, said = [Rank() for _ in range(number)], [None] * number
    barrier = threading.Barrier(number, timeout=30)

    def run(index: int) -> Any:
        def gathered(value: Any) -> list[Any]:
            said[index] = value
            barrier.wait()
            found = list(said)
            barrier.wait()
            return found

        def merged(mine: dict[Any, Any]) -> dict[Any, Any]:
            return {key: value for part in gathered(mine) for key, value in part.items()}

        most = (lambda rows: max(gathered(rows))) if in_step else None
        return ranks[index].scorer.values(pairs, 400, share=(index, number), exchange=merged, in_step=most)

    with ThreadPoolExecutor(number) as pool:
        return ranks, list(pool.map(run, range(number)))


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("number", [2, 3, 8])
def test_processes_have_equally_much_to_score_and_find_the_same(number: int, in_step: bool) -> None:
    pairs = items(200)
    alone = Rank()
    expected = alone.scorer.values(pairs, 400)
    ranks, found = scored(number, pairs, in_step=in_step)
    for values in found:
        for one, other in zip(expected, values, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    if in_step:
        assert len({len(rank.rows) for rank in ranks}) == 1
    else:
        assert sum(sum(rank.rows) for rank in ranks) == sum(alone.rows)
        assert max(sum(rank.rows) for rank in ranks) <= 1.1 * sum(alone.rows) / number


def test_a_process_without_a_pair_stays_in_step() -> None:
    ranks, found = scored(3, items(2), in_step=True)
    assert [len(rank.rows) for rank in ranks] == [1, 1, 1]
    assert [[len(value) for value in item] for item in found[2]] == [[len(c) for _, c in item] for item in items(2)]
