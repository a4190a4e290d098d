"""The pairs that a run held out, tokenised as in training."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from preftune.errors import DataError, PreftuneError
from preftune.evaluation.pairs import EvalPairs, prepare_pairs, read_table
from preftune.models.tuned import Tuned


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
    from preftune.data import DataOptions

    if num_pairs == 0:
        return "nothing was scored: --num_pairs is 0"
    if dataset is None:
        rows = _of_run(tuned)
        if isinstance(rows, str):
            return rows
        table = read_table(rows)
    else:
        table = read_table(dataset, split=split)
    options = DataOptions(
        max_length=tuned.setting("trainer", "max_length", 1024),
        truncation_mode=tuned.setting("trainer", "truncation_mode", "keep_start"),
        on_bad_rows="skip",
        chat_template=None,
        max_dropped_share=None,
    )
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
    if "test" not in tuned.data:
        return f"nothing was scored: the run held no pairs out; {remedy}"
    script = tuned.settings.get("script", {})
    try:
        found = _read_again(tuned, script)
    except (PreftuneError, OSError, ValueError) as error:
        return f"nothing was scored: the run's held-out pairs cannot be read ({_flat(error)}); {remedy}"
    if found is None:
        return f"nothing was scored: the run's record does not name its data; {remedy}"
    if not {"chosen", "rejected"} <= set(found.column_names):
        return f"nothing was scored: the run's held-out rows are no pairs; {remedy}"
    return found


def _read_again(tuned: Tuned, script: dict[str, Any]) -> Any:
    from preftune.data import load

    common: dict[str, Any] = {
        "dataset_config": script.get("dataset_config"),
        "columns": script.get("dataset_columns"),
        "pairing": script.get("pairing") or "best_worst",
        "dataset_format": tuned.setting("trainer", "dataset_format", "auto"),
        "on_bad_rows": tuned.setting("trainer", "on_bad_rows", "skip"),
        "seed": tuned.setting("trainer", "seed", 42),
        "implicit_prompt": tuned.setting("trainer", "implicit_prompt", "transcript"),
    }
    several: dict[str, Any] = {key: script.get(key) for key in ("dataset_mixture", "dataset_mixer", "dataset_splits")}
    if any(several.values()):
        return load(**several, **common).get("test")
    name = script.get("dataset_name")
    if not name:
        return None
    if os.path.sep in name and not os.path.exists(name) and name.startswith((".", "/")):
        raise DataError("no such file", where="dataset_name", value=name)
    splits = load(name, split=script.get("dataset_train_split") or "train", **common)
    if "test" in splits:
        return splits["test"]
    return load(name, split=script.get("dataset_test_split") or "test", with_test=False, **common)["train"]


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
