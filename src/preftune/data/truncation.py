"""Truncation of tokenised pairs: pure functions on lists of token ids."""

from __future__ import annotations

from dataclasses import dataclass

Ids = list[int]

PROMPT_FILLS = "prompt_fills_max_length"
EMPTY = "completion_empty"
NOT_SCORED = "no_scored_token"


@dataclass(frozen=True)
class TokenPair:
    """Token ids of one pair.

    Attributes:
        prompt: Tokens that both sequences begin with.
        chosen: Completion tokens of the chosen answer.
        rejected: Completion tokens of the rejected answer.
        rejected_prompt: Prompt of the rejected sequence where it differs from ``prompt``, else ``None``.
    """

    prompt: Ids
    chosen: Ids
    rejected: Ids
    rejected_prompt: Ids | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the two sequences together."""
        prompt = self.prompt if self.rejected_prompt is None else self.rejected_prompt
        return len(self.prompt) + len(self.chosen) + len(prompt) + len(self.rejected)


def cut_prompt(prompt: Ids, max_prompt_length: int | None, mode: str) -> Ids:
    """The last (``keep_end``) or first (``keep_start``) ``max_prompt_length`` tokens of a prompt."""
    if max_prompt_length is None or len(prompt) <= max_prompt_length:
        return prompt
    return prompt[-max_prompt_length:] if mode == "keep_end" else prompt[:max_prompt_length]


def cut_sequence(prompt: Ids, completion: Ids, max_length: int, mode: str) -> tuple[Ids, Ids]:
    """Cut ``prompt + completion`` to ``max_length`` tokens and split the result again.

    Args:
        prompt: Prompt tokens.
        completion: Completion tokens.
        max_length: Longest sequence, at least 1.
        mode: ``keep_start`` keeps the first tokens, ``keep_end`` the last.

    Returns:
        What is left of prompt and completion.
    """
    excess = len(prompt) + len(completion) - max_length
    if excess <= 0:
        return prompt, completion
    if mode == "keep_end":
        return prompt[excess:], completion[max(0, excess - len(prompt)) :]
    return prompt[:max_length], completion[: max(0, max_length - len(prompt))]


def truncate(
    pair: TokenPair, max_length: int | None, max_prompt_length: int | None, mode: str
) -> tuple[TokenPair | None, str | None]:
    """Truncate a pair the way TRL 1.16's ``DPOTrainer`` and its collator do together.

    Each sequence is cut on its own, so ``keep_end`` may leave the two with different prompts.

    Args:
        pair: Untruncated pair.
        max_length: Longest sequence in tokens, or ``None``.
        max_prompt_length: Longest prompt in tokens, or ``None``; applied first.
        mode: ``keep_start`` or ``keep_end``.

    Returns:
        The pair, or ``None`` and the reason why nothing is left to learn from.
    """
    rejected_prompt = pair.prompt if pair.rejected_prompt is None else pair.rejected_prompt
    prompts = [cut_prompt(ids, max_prompt_length, mode) for ids in (pair.prompt, rejected_prompt)]
    answers = [pair.chosen, pair.rejected]
    if max_length is not None:
        if mode == "keep_start" and any(len(prompt) >= max_length for prompt in prompts):
            return None, PROMPT_FILLS
        sequences = [cut_sequence(p, a, max_length, mode) for p, a in zip(prompts, answers, strict=True)]
        prompts = [prompt for prompt, _ in sequences]
        answers = [answer for _, answer in sequences]
    for prompt, answer in zip(prompts, answers, strict=True):
        if not answer:
            return None, EMPTY
        # Nothing stands before the first token of a sequence, so nothing predicts it.
        if not prompt and len(answer) == 1:
            return None, NOT_SCORED
    same = prompts[0] == prompts[1]
    return TokenPair(prompts[0], answers[0], answers[1], None if same else prompts[1]), None
