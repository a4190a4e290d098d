"""Layouts, rows and plans: integers that have to be exactly right."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.packing import Branch, RowLayout, Tree, build_row, pair_trees, plan_rows
from preftune.packing import plan as planning


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_a_pair_is_laid_out_as_prompt_chosen_rejected() -> None:
    row = build_row(pair_trees(ids(1, 2, 3), ids(4, 5), ids(6), None, (0, 1)), [7])
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    # Both first completion tokens are predicted by the last prompt token.
    assert row.source.tolist() == [2, 3, 2]
    assert row.target_ids.tolist() == [4, 5, 6]
    assert row.target_slot.tolist() == [0, 0, 1]
    assert row.target_rank.tolist() == [0, 1, 0]
    assert row.target_branch.tolist() == [0, 0, 1]
    assert row.examples == (7,)


def test_pairs_stand_behind_one_another() -> None:
    trees = [
        *pair_trees(ids(1), ids(2), ids(3, 4), None, (0, 1)),
        *pair_trees(ids(5, 6), ids(7), ids(8), None, (2, 3)),
    ]
    row = build_row(trees)
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert row.position_ids.tolist() == [0, 1, 1, 2, 0, 1, 2, 2]
    assert row.source.tolist() == [0, 0, 2, 5, 5]
    assert row.target_ids.tolist() == [2, 3, 4, 7, 8]


def test_different_prompts_are_two_trees() -> None:
    row = build_row(pair_trees(ids(1, 2), ids(3), ids(4, 5), ids(2), (0, 1)))
    assert row.input_ids.tolist() == [1, 2, 3, 2, 4, 5]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert row.source.tolist() == [1, 3, 4]


def test_the_first_token_of_a_sequence_is_never_scored() -> None:
    row = build_row(pair_trees(ids(), ids(3, 4), ids(5, 6, 7), None, (0, 1)))
    assert row.input_ids.tolist() == [3, 4, 5, 6, 7]
    assert row.target_ids.tolist() == [4, 6, 7]
    assert row.source.tolist() == [0, 2, 3]


def test_masked_tokens_are_not_scored() -> None:
    branch = Branch(ids(1, 2, 3, 4), 0, np.array([True, False, True, True]))
    row = build_row([Tree(ids(), (branch,))])
    assert row.target_ids.tolist() == [3, 4]
    assert row.source.tolist() == [1, 2]


def test_layout_names_tree_and_branch_of_every_token() -> None:
    layout = RowLayout.of(pair_trees(ids(1, 2), ids(3), ids(4, 5), None, (0, 1)))
    tree, branch = layout.tree_and_branch()
    assert tree.tolist() == [0] * 5
    assert branch.tolist() == [-1, -1, 0, 1, 1]
    assert layout.longest == 4


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 500), st.integers(1, 4))
def test_every_example_is_in_exactly_one_row_within_budget(lengths: list[int], budget: int, least: int) -> None:
    rows = plan_rows(lengths, budget, least)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert len(rows) >= least
    for row in rows:
        assert len(row) <= 1 or sum(lengths[index] for index in row) <= budget


@given(st.lists(st.integers(1, 50), min_size=8, max_size=40))
def test_rows_are_evenly_filled(lengths: list[int]) -> None:
    rows = plan_rows(lengths, max(sum(lengths) // 2, max(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    # Longest-processing-time scheduling never leaves two rows further apart than one item.
    assert max(filled) - min(filled) <= max(lengths)


@pytest.mark.parametrize("budget", [1, 10_000])
def test_no_examples_make_one_empty_row(budget: int) -> None:
    assert plan_rows([], budget) == [[]]


def test_a_scored_prompt_has_a_slot_of_its_own() -> None:
    trees = [
        *pair_trees(ids(9), ids(8), ids(7), None, (0, 1), 2),
        *pair_trees(ids(1, 2, 3), ids(4, 5), ids(6), None, (3, 4), 5),
    ]
    row = build_row(trees)
    # A prompt of one token has nothing to score; the next begins at position 3 of the row.
    by_slot = {
        slot: (row.target_ids[row.target_slot == slot].tolist(), row.source[row.target_slot == slot].tolist())
        for slot in range(6)
    }
    assert by_slot == {
        0: ([8], [0]),
        1: ([7], [0]),
        2: ([], []),
        3: ([4, 5], [5, 6]),
        4: ([6], [5]),
        5: ([2, 3], [3, 4]),
    }
    prompt = row.target_slot == 5
    assert row.target_rank[prompt].tolist() == [-2, -1]
    assert row.target_branch.tolist() == [0, 1, 2, 2, 2, 2, 3]


def test_a_scored_prompt_belongs_to_the_chosen_sequence_where_prompts_differ() -> None:
    row = build_row(pair_trees(ids(1, 2), ids(3), ids(4, 5, 6), ids(7), (0, 1), 2))
    assert row.target_ids[row.target_slot == 2].tolist() == [2]
    assert row.target_branch.tolist() == [0, 0, 1, 1, 1]


def test_unfolding_finds_scored_prompts_too() -> None:
    """The padded path looks a target's prediction up in its own sequence; there it must stand one place before it."""
    from preftune.models.forward import unfold

    trees = [
        *pair_trees(ids(1, 2, 3), ids(4, 5), ids(6), None, (0, 1), 2),
        *pair_trees(ids(), ids(7, 8), ids(9, 10), None, (3, 4), 5),
        *pair_trees(ids(11, 12), ids(13), ids(14), ids(15, 16, 17), (6, 7), 8),
    ]
    row = build_row(trees)
    sequences, places = unfold(row)
    found = [sequences[number][position + 1] for number, position in places]
    assert found == row.target_ids.tolist()


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 50), st.integers(1, 4))
def test_many_examples_are_planned_within_the_budget_too(lengths: list[int], budget: int, least: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_EXACT", 0)
        rows = plan_rows(lengths, budget, least)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert len(rows) >= least
    for row in rows:
        assert row == sorted(row)
        assert len(row) <= 1 or sum(lengths[n] for n in row) <= budget or max(lengths[n] for n in row) == 0


def skewed(number: int) -> list[int]:
    """Token counts as skewed as those of real dialogues."""
    draw = random.Random(0)
    return [min(int(draw.lognormvariate(5.2, 0.8)) + 10, 2000) for _ in range(number)]


@pytest.mark.parametrize("budget", [1024, 4096, 32768])
def test_many_examples_need_no_more_rows(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = skewed(5000)
    many = plan_rows(lengths, budget)
    monkeypatch.setattr(planning, "_EXACT", 1 << 62)
    assert len(many) <= len(plan_rows(lengths, budget))


@pytest.mark.slow
def test_a_million_examples_are_planned_in_seconds() -> None:
    lengths = skewed(1_000_000)
    began = time.process_time()
    plan_rows(lengths, 4096)
    assert time.process_time() - began < 5
