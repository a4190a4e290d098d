"""Which examples share a row, and which process takes which examples."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

#: Up to so many examples the rows are the most evenly filled ones; beyond, finding them would take longer than a step.
_EXACT = 4096
#: Longest budget that filling row by row is made for: its book-keeping is a bit for every token.
_MOST_BITS = 1 << 17


def plan_rows(lengths: Sequence[int], max_tokens: int, min_rows: int = 1) -> list[list[int]]:
    """Distribute examples over as few rows as the token budget asks for, evenly filled.

    The number of rows is the smallest that the budget allows; examples then go, longest first, to the emptiest row, so
    that rows take about equal time and memory. An example longer than the budget has a row of its own: it is never cut.
    Of more than 4096 examples each goes, longest first, to the fullest row that has room for it: that takes time in
    proportion to their number, and all rows but a few are full.

    Args:
        lengths: Tokens of each example.
        max_tokens: Budget of a row, in tokens.
        min_rows: Use at least this many rows, empty ones included; sharded training needs equal numbers per process.

    Returns:
        Example numbers per row, ascending within a row.

    >>> plan_rows([5, 3, 9, 2], 10)
    [[2], [0, 1, 3]]
    """
    order = _longest_first(lengths)
    if len(lengths) > _EXACT and max_tokens <= _MOST_BITS:
        rows = [sorted(row) for row in _fill(order, lengths, max_tokens)]
        return rows + [[] for _ in range(min_rows - len(rows))]
    num_rows = max(min_rows, -(-sum(lengths) // max_tokens), _rows_of_large(lengths, max_tokens), 1)
    while True:
        spread = _spread(order, lengths, max_tokens, num_rows)
        if spread is not None:
            break
        num_rows += 1 if len(lengths) <= _EXACT else 1 + num_rows // 1000
    kept = [sorted(row) for row in spread if row] or [[]]
    return kept + [[] for _ in range(min_rows - len(kept))]


def share_out(costs: Sequence[float], number: int, most: int | None = None) -> list[list[int]]:
    """Distribute examples over processes, which then take about equal time.

    Examples go, most costly first, to the process that has the least to do. The result depends on the arguments alone,
    so that every process comes to the same one by itself.

    Args:
        costs: What each example costs, such as its tokens.
        number: Number of processes.
        most: Most examples that a process takes; by default any number.

    Returns:
        Example numbers per process, ascending; some may have none.

    >>> share_out([5, 3, 9, 2], 2)
    [[2], [0, 1, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(number)]
    # Of equally busy processes the one with fewer examples: costs may be zero.
    busy = [(0.0, 0, share) for share in range(number)]
    for index in _longest_first(costs):
        cost, count, share = heapq.heappop(busy)
        shares[share].append(index)
        if most is None or count + 1 < most:
            heapq.heappush(busy, (cost + costs[index], count + 1, share))
    return [sorted(share) for share in shares]


def _longest_first(lengths: Sequence[float]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


def _fill(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Best-fit assignment: every example to the fullest row that has room for it."""
    # What is longer than a row stays alone.
    rows = [[index] for index in itertools.takewhile(lambda index: lengths[index] > max_tokens, order)]
    # Rows by the tokens that they have left, and a bit for every such number that some row has.
    with_room: list[list[int]] = [[] for _ in range(max_tokens + 1)]
    rooms, start = 0, len(rows)
    while start < len(order):
        length = int(lengths[order[start]])
        end = start
        while end < len(order) and lengths[order[end]] == length:
            end += 1
        while start < end:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else max_tokens
            if not fitting:
                with_room[room].append(len(rows))
                rows.append([])
            # A row stays the fullest one with room until there is no more of it.
            count = room // length if length else end - start
            while with_room[room] and start < end:
                row = with_room[room].pop()
                taken = order[start : min(start + count, end)]
                rows[row] += taken
                start += len(taken)
                with_room[room - length * len(taken)].append(row)
                rooms |= 1 << (room - length * len(taken))
            rooms = rooms | 1 << room if with_room[room] else rooms & ~(1 << room)
    return rows


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
