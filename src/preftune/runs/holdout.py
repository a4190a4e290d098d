"""Rows that are held out of training, whole prompts at a time."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from preftune.errors import ConfigError, DataError

#: The setting that asks for it.
SETTING = "test_split_size"


def prompt_key(row: Mapping[str, Any]) -> str:
    """What two rows have in common that answer the same prompt: the prompt, or the turns before the answer."""
    prompt = row.get("prompt")
    if prompt is None:
        prompt = _opening(row)
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def _opening(row: Mapping[str, Any]) -> Any:
    """The turns that both conversations of a row begin with; of one conversation, those before its first answer."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    turns = row.get("messages")
    if isinstance(chosen, list) and isinstance(rejected, list):
        pairs = list(zip(chosen, rejected, strict=False))
        shared = next((n for n, (one, other) in enumerate(pairs) if one != other), len(pairs))
        return chosen[:shared]
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
        return chosen[:shared]
    if isinstance(turns, list):
        answers = (n for n, turn in enumerate(turns) if isinstance(turn, Mapping) and turn.get("role") == "assistant")
        return turns[: next(answers, len(turns))]
    return {name: value for name, value in row.items() if name in ("text", "chosen", "completion")}


def chosen_prompts(keys: Sequence[Hashable], number: int, seed: int) -> list[bool]:
    """Which rows are held out: all rows of a number of distinct prompts that are drawn at random.

    Args:
        keys: Prompt of each row.
        number: How many prompts.
        seed: Of the draw.

    Returns:
        One flag per row; no prompt has rows on both sides.
    """
    prompts = list(dict.fromkeys(keys))
    drawn = set(np.random.default_rng([seed, 11]).permutation(len(prompts))[:number].tolist())
    out = {prompt for position, prompt in enumerate(prompts) if position in drawn}
    return [key in out for key in keys]


def hold_out(dataset: Any, size: float, seed: int) -> dict[str, Any]:
    """Hold rows out, whole prompts at a time, so that no prompt is trained on and evaluated on.

    Args:
        dataset: Canonical rows.
        size: A share of the prompts, below 1; or about how many rows, never more.
        seed: Of the choice.

    Returns:
        ``train`` and ``test``.

    Raises:
        ConfigError: The size is out of range.
        DataError: There are too few prompts.
    """
    keys = [prompt_key(row) for row in dataset]
    prompts = len(set(keys))
    if isinstance(size, bool) or not (0 < size < 1 or (float(size).is_integer() and 1 <= size < len(keys))):
        raise ConfigError(
            "not a share or a number of rows",
            where=SETTING,
            value=size,
            allowed=f"between 0 and 1, or 1 to {len(keys) - 1} rows",
        )
    number = max(1, round(size * prompts if size < 1 else size * prompts / len(keys)))
    if prompts < 2 or number >= prompts:
        raise DataError(
            "too few prompts to hold some out",
            where=SETTING,
            value=prompts,
            allowed=f"{number + 1} or more",
            remedy=f"leave {SETTING} out, and evaluate on a file of other prompts",
        )
    flags = chosen_prompts(keys, number, seed)
    return {
        "train": dataset.select([n for n, out in enumerate(flags) if not out]),
        "test": dataset.select([n for n, out in enumerate(flags) if out]),
    }
