"""Trees and the layout of a row.

A *tree* is a prefix that every branch begins with, followed by the branches. A preference pair is one tree with the
branches chosen and rejected; an SFT example is one tree with one branch. Trees follow one another in a row::

    [ prefix | branch 0 | branch 1 ][ prefix | branch 0 ] ...

A branch sees its own prefix and itself, nothing else, and its positions continue those of the prefix. Attention over
the row is therefore exactly attention over the separate sequences ``prefix + branch``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Branch:
    """The tokens of one sequence after its shared prefix.

    Attributes:
        ids: Token ids, shape ``(tokens,)``.
        slot: Number of the sequence whose log-prob the scored tokens add to.
        scored: Which tokens count towards the log-prob, shape ``(tokens,)``; ``None`` means all of them.
    """

    ids: Ids
    slot: int
    scored: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Tree:
    """A shared prefix and its branches.

    Attributes:
        prefix: Token ids that each branch continues, shape ``(tokens,)``; may be empty.
        branches: One or more branches.
        prefix_slot: Slot that the prefix tokens' log-probs add to, the first token's excepted; ``None`` does not
            score them.
    """

    prefix: Ids
    branches: tuple[Branch, ...]
    prefix_slot: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the tree takes in a row."""
        return len(self.prefix) + sum(len(branch.ids) for branch in self.branches)


@dataclass(frozen=True)
class TreeSpan:
    """Where a tree is in a row.

    Attributes:
        start: Position of its first token.
        prefix: Length of the prefix.
        branches: Length of every branch, in order.
    """

    start: int
    prefix: int
    branches: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Length of the whole tree."""
        return self.prefix + sum(self.branches)

    @property
    def longest(self) -> int:
        """Length of the longest sequence ``prefix + branch``."""
        return self.prefix + max(self.branches)

    def branch_starts(self) -> list[int]:
        """Position in the row of every branch's first token."""
        starts, position = [], self.start + self.prefix
        for length in self.branches:
            starts.append(position)
            position += length
        return starts


@dataclass(frozen=True)
class RowLayout:
    """The trees of one row, in order and without gaps.

    Attributes:
        spans: One span per tree.
    """

    spans: tuple[TreeSpan, ...]

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> RowLayout:
        """Lay ``trees`` out behind one another."""
        spans, start = [], 0
        for tree in trees:
            span = TreeSpan(start, len(tree.prefix), tuple(len(branch.ids) for branch in tree.branches))
            spans.append(span)
            start += span.num_tokens
        return cls(tuple(spans))

    def extended(self, num_tokens: int) -> RowLayout:
        """The same row with ``num_tokens`` tokens more at its end, which see themselves alone."""
        if not num_tokens:
            return self
        return RowLayout((*self.spans, TreeSpan(self.num_tokens, 0, (num_tokens,))))

    @cached_property
    def num_tokens(self) -> int:
        """Length of the row."""
        return sum(span.num_tokens for span in self.spans)

    @cached_property
    def longest(self) -> int:
        """Longest single sequence in the row."""
        return max(span.longest for span in self.spans)

    def position_ids(self) -> Ids:
        """Positions, restarting at ``len(prefix)`` for every branch, shape ``(num_tokens,)``."""
        parts = []
        for span in self.spans:
            parts.append(np.arange(span.prefix))
            parts.extend(np.arange(span.prefix, span.prefix + length) for length in span.branches)
        return np.concatenate(parts).astype(np.int64)

    def tree_and_branch(self) -> tuple[Ids, Ids]:
        """Tree and branch number of every token, the prefix counting as branch ``-1``; both ``(num_tokens,)``."""
        tree_of, branch_of = [], []
        for number, span in enumerate(self.spans):
            tree_of.append(np.full(span.num_tokens, number))
            branch_of.append(np.full(span.prefix, -1))
            branch_of.extend(np.full(length, index) for index, length in enumerate(span.branches))
        return np.concatenate(tree_of).astype(np.int64), np.concatenate(branch_of).astype(np.int64)
