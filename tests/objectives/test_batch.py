"""Batches check what they are given: nothing broadcasts, nothing is guessed."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from tests.objectives.cases import labelled, pairs

from preftune.errors import DataError
from preftune.objectives import PairLogps, UnpairedLogps


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("chosen_logps", torch.zeros(4, 1), "PairLogps.chosen_logps"),
        ("chosen_logps", torch.tensor(0.0), "PairLogps.chosen_logps"),
        ("rejected_logps", torch.zeros(1), "nothing is broadcast"),
        ("ref_chosen_logps", torch.zeros(5), "nothing is broadcast"),
        ("rejected_logps", torch.zeros(4, dtype=torch.long), "floating"),
        ("rejected_logps", [0.0] * 4, "floating"),
        ("rejected_logps", None, "floating"),
        ("chosen_lengths", None, "numeric"),
        ("chosen_lengths", 3.0, "numeric"),
        ("chosen_lengths", torch.ones(4, dtype=torch.bool), "numeric"),
        ("rejected_lengths", torch.ones(3), "nothing is broadcast"),
        ("chosen_sum_logps", torch.ones(4, 1), "nothing is broadcast"),
        ("chosen_scored", torch.ones(1), "nothing is broadcast"),
        ("margins", torch.ones(1), "nothing is broadcast"),
        ("weights", torch.ones(5), "nothing is broadcast"),
        ("wpo_weights", torch.tensor(1.0), "nothing is broadcast"),
        ("mean_chosen_scored", torch.ones(4), "one number"),
        ("ref_rejected_logps", None, "only one of the two"),
        ("margins", torch.ones(4, device="meta"), "another device"),
    ],
)
def test_pairs_are_checked(field: str, value: Any, match: str) -> None:
    good = pairs(4)
    with pytest.raises(DataError, match=match) as caught:
        replace(good, **{field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("logps", torch.zeros(4, 1), "nothing is broadcast"),
        ("ref_logps", torch.zeros(1), "nothing is broadcast"),
        ("ref_logps", None, "floating"),
        ("labels", torch.ones(4), "boolean"),
        ("labels", [True] * 4, "boolean"),
        ("labels", torch.ones(1, dtype=torch.bool), "nothing is broadcast"),
        ("weights", torch.ones(1), "nothing is broadcast"),
    ],
)
def test_unpaired_are_checked(field: str, value: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        replace(labelled(4), **{field: value})


def test_batches_are_frozen_and_keyword_only() -> None:
    batch = pairs(2)
    with pytest.raises(FrozenInstanceError):
        batch.weights = torch.ones(2)  # type: ignore[misc]
    with pytest.raises(TypeError):
        PairLogps(torch.zeros(1), torch.zeros(1))  # type: ignore[call-arg]


def test_dtype_is_the_widest_and_at_least_float32() -> None:
    half = torch.zeros(2, dtype=torch.float16)
    batch = PairLogps(
        chosen_logps=half, rejected_logps=half, chosen_lengths=torch.ones(2), rejected_lengths=torch.ones(2)
    )
    assert batch.chosen_logps.dtype == batch.chosen_lengths.dtype == torch.float32
    mixed = replace(batch, rejected_logps=half.double())
    assert mixed.chosen_logps.dtype == mixed.chosen_lengths.dtype == torch.float64


def test_half_precision_keeps_its_gradient() -> None:
    leaf = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    batch = PairLogps(
        chosen_logps=leaf, rejected_logps=leaf, chosen_lengths=torch.ones(2), rejected_lengths=torch.ones(2)
    )
    (gradient,) = torch.autograd.grad(batch.chosen_logps.sum(), [leaf])
    assert gradient.tolist() == [1.0, 1.0]


def test_defaults_follow_a_replaced_field() -> None:
    batch = pairs(3)
    moved = replace(batch, chosen_logps=batch.chosen_logps - 1.0, chosen_lengths=batch.chosen_lengths + 2)
    assert torch.equal(moved.sft_logps, moved.chosen_logps)
    assert torch.equal(moved.sft_tokens, moved.chosen_lengths)
    assert moved.mean_sft_tokens == batch.mean_sft_tokens + 2
    assert replace(batch, mean_chosen_scored=7).mean_sft_tokens == 7.0
    assert replace(batch, chosen_sum_logps=batch.chosen_logps * 2).sft_logps[0] == 2 * batch.chosen_logps[0]


def test_select_and_concat_are_inverse() -> None:
    whole = pairs(5, weights=torch.rand(5))
    parts = [whole.select(slice(0, 2)), whole.select(torch.tensor([False, False, True, True, True]))]
    assert [part.num_pairs for part in parts] == [2, 3]
    assert all(part.mean_sft_tokens == whole.mean_sft_tokens for part in parts)
    joined = PairLogps.concat(parts)
    for name in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "chosen_lengths", "margins", "weights"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert joined.mean_sft_tokens == whole.mean_sft_tokens
    assert joined.wpo_weights is None


def test_concat_refuses_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="nothing to join"):
        PairLogps.concat([])
    with pytest.raises(DataError, match=r"1 of 2"):
        PairLogps.concat([pairs(2), pairs(2, margins=None)])


def test_unpaired_counts() -> None:
    batch = labelled(6)
    assert batch.num_examples == 6
    assert torch.equal(batch.logratios, batch.logps - batch.ref_logps)
    assert isinstance(batch, UnpairedLogps)
