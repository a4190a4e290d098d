"""Which examples share a row."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def plan_rows(lengths: Sequence[int], max_tokens: int, min_rows: int = 1) -> list[list[int]]:
    """Distribute examples over as few rows as the token budget asks for, evenly filled.

    The number of rows is the smallest that the budget allows; examples then go, longest first, to the emptiest row, so
    that rows take about equal time and memory. An example longer than the budget has a row of its own: it is never cut.

    Args:
        lengths: Tokens of each example.
        max_tokens: Budget of a row, in tokens.
        min_rows: Use at least this many rows, empty ones included; sharded training needs equal numbers per process.

    Returns:
        Example numbers per row, ascending within a row.

    >>> plan_rows([5, 3, 9, 2], 10)
    [[2], [0, 1, 3]]
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    num_rows = max(min_rows, -(-sum(lengths) // max_tokens), _rows_of_large(lengths, max_tokens), 1)
    while True:
        rows = _spread(order, lengths, max_tokens, num_rows)
        if rows is not None:
            break
        num_rows += 1
    rows = [sorted(row) for row in rows]
    kept = [row for row in rows if row] or [[]]
    return kept + [[] for _ in range(min_rows - len(kept))]


def _rows_of_large(lengths: Sequence[int], max_tokens: int) -> int:
    """Rows that large examples need: of those above a third of the budget, for example, two fit in a row."""
    least = 0
    for fit in range(1, 9):
        count = sum(length * (fit + 1) > max_tokens for length in lengths)
        least = max(least, -(-count // fit))
    return least


def _spread(order: Sequence[int], lengths: Sequence[int], max_tokens: int, num_rows: int) -> list[list[int]] | None:
    """Longest-processing-time assignment to ``num_rows`` rows; ``None`` where a row would overflow."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    filled = [(0, row) for row in range(num_rows)]
    heapq.heapify(filled)
    for index in order:
        used, row = heapq.heappop(filled)
        if used and used + lengths[index] > max_tokens:
            return None
        rows[row].append(index)
        heapq.heappush(filled, (used + lengths[index], row))
    return rows
