"""What an evaluation says before it begins."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preftune.evaluation.pairs import EvalPairs


def announce(pairs: EvalPairs, *, scored: int, answers: int, max_new_tokens: int, drawn: int) -> None:
    """Say what an evaluation is going to do.

    Args:
        pairs: What is scored.
        scored: By how many models.
        answers: Answers that are drawn of a model.
        max_new_tokens: Longest of them.
        drawn: Of how many models.
    """
    tokens = sum(len(ids) for pair in pairs.pairs for _, ids in pair.item)
    text = f"scoring {len(pairs.pairs):,} pairs ({tokens:,} answer tokens) with {_models(scored)}"
    if answers:
        text += f"; then {answers:,} answers of up to {max_new_tokens} tokens of {_models(drawn)}"
    print(text, file=sys.stderr, flush=True)


def _models(number: int) -> str:
    return f"{number} models" if number > 1 else "1 model"
