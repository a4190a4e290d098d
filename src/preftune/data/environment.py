"""Turns within an answer that the model does not write: what tools returned, and what the user said in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preftune.data.assistant import turn_spans
from preftune.data.formats.base import BadRow, Message, Row
from preftune.data.tokenise import Encoder
from preftune.data.truncation import Ids

#: Columns of the masks of completions: 1 for a token that is scored.
MASK_COLUMNS = ("chosen_mask", "rejected_mask")


def has_environment(answer: Any) -> bool:
    """Whether somebody else than the assistant speaks in an answer."""
    return isinstance(answer, list) and any(
        isinstance(turn, Mapping) and turn.get("role") != "assistant" for turn in answer
    )


def own_words(
    encoder: Encoder, row: Row, field: str, sequence: Sequence[int], start: int, eos: int | None = None
) -> list[int] | BadRow:
    """1 for every token of a completion but those of turns that the model does not write.

    Args:
        encoder: Tokenizer and template.
        row: Canonical row of messages.
        field: The answer.
        sequence: Token ids of the prompt with that answer.
        start: Where the completion begins in them.
        eos: A token that may have been appended to what the template writes.

    Returns:
        The mask of ``sequence[start:]``; a :class:`BadRow` where the template does not show where turns are.
    """
    arguments = encoder.arguments(row)
    prompt: list[Message] = row["prompt"]
    conversation = encoder.settled([*prompt, *row[field]], arguments)
    spans = turn_spans(encoder, conversation, arguments)
    if isinstance(spans, BadRow):
        return spans
    earlier = sum(turn.get("role") == "assistant" for turn in prompt)
    mine = spans[earlier:]
    (text,) = encoder.render([conversation], arguments, False)
    assert isinstance(text, str)  # it was rendered a moment ago
    encoded = encoder.tokenizer(text, add_special_tokens=False)
    written = list(encoded["input_ids"])
    appended = [] if eos is None or len(sequence) == len(written) else [eos]
    if not encoder.tokenizer.is_fast or [*written, *appended] != list(sequence):
        return BadRow(
            "template_changes_earlier_turns",
            field,
            "turns that the model does not write cannot be located in this row",
            remedy="set environment_turns: scored, or on_bad_rows: skip",
        )
    if not mine:
        return BadRow(
            "no_assistant_turn", field, f"{field!r} holds no assistant turn to learn from", remedy="remove it"
        )
    first = conversation[len(prompt)].get("role") == "assistant"
    begins = 0 if first else mine[0][0]
    own = [(begins if number == 0 else low, high) for number, (low, high) in enumerate(mine)]
    mask = [0] * (len(sequence) - start)
    for low, high in own:
        for position in _tokens(encoded, low, high, len(text)):
            if position >= start:
                mask[position - start] = 1
    mask[len(mask) - len(appended) :] = [1] * len(appended)
    return mask


def _tokens(encoded: Any, low: int, high: int, length: int) -> range:
    found = [token for token in map(encoded.char_to_token, range(low, min(high, length))) if token is not None]
    return range(found[0], found[-1] + 1) if found else range(0)


def cut(mask: list[int] | None, kept: Ids, mode: str) -> list[int] | None:
    """The part of a mask that belongs to what truncation left of a completion; ``None`` where all of it is scored."""
    if mask is None:
        return None
    part = mask[-len(kept) :] if mode == "keep_end" else mask[: len(kept)]
    return None if all(part) else part
