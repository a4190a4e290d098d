"""From trees to the integer arrays that a packed row consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from preftune.packing.layout import Branch, Ids, RowLayout, Tree

Scored = npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class PackedRow:
    """One packed row and what is to be scored in it. ``T`` row tokens, ``N`` scored tokens.

    Attributes:
        input_ids: Token ids, shape ``(T,)``.
        position_ids: Positions, shape ``(T,)``.
        layout: The trees of the row.
        source: Row position whose hidden state predicts each scored token, shape ``(N,)``.
        target_ids: The scored tokens, shape ``(N,)``.
        target_slot: Slot of the sequence that each scored token belongs to, shape ``(N,)``.
        target_rank: Index of each scored token within its branch, counted from 0, shape ``(N,)``; a scored prefix
            token's is negative, -1 being the prefix's last.
        target_branch: Number of the row's branch that each scored token belongs to, shape ``(N,)``; for a prefix token
            the first branch of its tree.
        examples: Numbers of the examples whose trees the row holds.
    """

    input_ids: Ids
    position_ids: Ids
    layout: RowLayout
    source: Ids
    target_ids: Ids
    target_slot: Ids
    target_rank: Ids
    target_branch: Ids
    examples: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Length of the row."""
        return len(self.input_ids)


def build_row(trees: Sequence[Tree], examples: Sequence[int] = ()) -> PackedRow:
    """Lay trees out as one row.

    The first token of a sequence has nothing before it and is never scored, even where a branch without a prefix asks
    for it.

    Args:
        trees: The trees, in order.
        examples: Numbers to remember as ``PackedRow.examples``.
    """
    layout = RowLayout.of(trees)
    ids: list[Ids] = []
    source: list[Ids] = []
    target: list[Ids] = []
    slot: list[Ids] = []
    rank: list[Ids] = []
    branch_of: list[Ids] = []
    num_branches = 0
    for tree, span in zip(trees, layout.spans, strict=True):
        ids.append(tree.prefix)
        if tree.prefix_slot is not None:
            length = max(len(tree.prefix) - 1, 0)
            source.append(span.start + np.arange(length))
            target.append(tree.prefix[1:])
            slot.append(np.full(length, tree.prefix_slot, dtype=np.int64))
            rank.append(np.arange(-length, 0))
            # The padded path finds the token in the sequence of the tree's first branch.
            branch_of.append(np.full(length, num_branches, dtype=np.int64))
        for branch, start in zip(tree.branches, span.branch_starts(), strict=True):
            ids.append(branch.ids)
            ranks = _scored_ranks(branch, has_prefix=span.prefix > 0)
            before = start + ranks - 1
            if span.prefix:
                before[ranks == 0] = span.start + span.prefix - 1
            source.append(before)
            target.append(branch.ids[ranks])
            slot.append(np.full(len(ranks), branch.slot, dtype=np.int64))
            rank.append(ranks)
            branch_of.append(np.full(len(ranks), num_branches, dtype=np.int64))
            num_branches += 1
    return PackedRow(
        input_ids=_join(ids),
        position_ids=layout.position_ids() if trees else _join([]),
        layout=layout,
        source=_join(source),
        target_ids=_join(target),
        target_slot=_join(slot),
        target_rank=_join(rank),
        target_branch=_join(branch_of),
        examples=tuple(examples),
    )


def pair_trees(
    prompt: Ids,
    chosen: Ids,
    rejected: Ids,
    rejected_prompt: Ids | None,
    slots: tuple[int, int],
    prompt_slot: int | None = None,
    scored: tuple[Scored, Scored] = (None, None),
) -> tuple[Tree, ...]:
    """Trees of a preference pair: one that shares the prompt, or two where truncation left different prompts.

    Args:
        prompt: Prompt tokens of the chosen sequence, and of the rejected one unless ``rejected_prompt`` is given.
        chosen: Completion tokens.
        rejected: Completion tokens.
        rejected_prompt: Prompt tokens of the rejected sequence where they differ.
        slots: Slots of the chosen and the rejected sequence.
        prompt_slot: Slot of the chosen sequence's prompt, where it is scored too.
        scored: Which tokens of the chosen and of the rejected completion count; ``None`` for all of one.
    """
    first, second = Branch(chosen, slots[0], scored[0]), Branch(rejected, slots[1], scored[1])
    if rejected_prompt is None and len(prompt):
        return (Tree(prompt, (first, second), prompt_slot),)
    # Without a prompt there is nothing to share.
    other = prompt if rejected_prompt is None else rejected_prompt
    return (Tree(prompt, (first,), prompt_slot), Tree(other, (second,)))


def _scored_ranks(branch: Branch, has_prefix: bool) -> Ids:
    ranks = np.arange(len(branch.ids)) if branch.scored is None else np.flatnonzero(branch.scored)
    return (ranks if has_prefix else ranks[ranks > 0]).astype(np.int64)


def _join(parts: list[Ids]) -> Ids:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
