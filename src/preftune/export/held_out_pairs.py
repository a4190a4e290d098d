"""The pairs that a run held out, tokenised as in training."""

from __future__ import annotations

from typing import Any

import numpy as np

from preftune.evaluation.pairs import EvalPairs, prepare_pairs, read_table
from preftune.models.tuned import Tuned
from preftune.runs.earlier_run import options_of_run, rows_of_run


def held_out(
    tuned: Tuned, tokenizer: Any, *, dataset: str | None, split: str | None, num_pairs: int, seed: int
) -> EvalPairs | str:
    """Find pairs to score.

    Args:
        tuned: What the run left.
        tokenizer: The tuned model's tokenizer.
        dataset: Name of a data set or file, in place of what the run held out.
        split: Its split.
        num_pairs: Most pairs; drawn at random where there are more.
        seed: Of the draw.

    Returns:
        The pairs, or why there are none.

    Raises:
        DataError: `dataset` cannot be read or used.
        ConfigError: `split` does not fit it.
    """
    if num_pairs == 0:
        return "nothing was scored: --num_pairs is 0"
    if dataset is None:
        rows = _of_run(tuned)
        if isinstance(rows, str):
            return rows
        table = read_table(rows)
    else:
        table = read_table(dataset, split=split)
    # One rendering for training, evaluation and this.
    options = options_of_run(tuned)
    pairs = prepare_pairs(table, tokenizer, options)
    if len(pairs.pairs) > num_pairs:
        picked = np.random.default_rng([seed, 2]).permutation(len(pairs.pairs))[:num_pairs]
        pairs.pairs = [pairs.pairs[number] for number in sorted(picked.tolist())]
        # Sources belong to all rows, and nobody asks for them here.
        pairs.sources = None
    return pairs


def _of_run(tuned: Tuned) -> Any:
    """The run's own test split, read again; or why it cannot be."""
    remedy = "name held-out pairs with --dataset_name"
    found = rows_of_run(tuned)
    if isinstance(found, str):
        return f"nothing was scored: {found}; {remedy}"
    if not {"chosen", "rejected"} <= set(found.column_names):
        return f"nothing was scored: the run's held-out rows are no pairs; {remedy}"
    return found
