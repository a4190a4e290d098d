"""Which tokens of a conversation the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from preftune.data.formats.base import BadRow, Message, Row, common_prefix
from preftune.data.tokenise import Encoder, template_error
from preftune.data.truncation import Ids
from preftune.errors import ModelError

Masked = tuple[Ids, list[int]]

#: A private-use character, which no text has.
_MARK = "\ue0ff"
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_markers(encoder: Encoder) -> bool:
    """Whether the chat template marks assistant text with ``{% generation %}``."""
    template = encoder.chat_template or encoder.tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template["default"]
    return isinstance(template, str) and _MARKER.search(template) is not None


def assistant_masks(
    encoder: Encoder, conversations: Sequence[list[Message]], rows: Sequence[Row]
) -> list[Masked | BadRow]:
    """Token ids of conversations, and 1 for every token of an assistant turn.

    A template with ``{% generation %}`` says itself what the assistant wrote. For any other, a turn begins where the
    rendering of the turns before it, with the generation prompt, ends, and reaches as far as the rendering of the
    conversation up to and with the turn. Templates that render a turn differently once others follow (Qwen3 keeps the
    thinking part of the last turn alone) are rendered once more with a mark behind everything that the assistant says.

    Args:
        encoder: Tokenizer and template.
        conversations: Lists of messages.
        rows: The row each belongs to, for its tools and template arguments.

    Returns:
        ``(ids, mask)`` per conversation; a :class:`BadRow` where the template failed, has no assistant text, or does
        not show where the assistant's turns are.

    Raises:
        ModelError: The tokenizer cannot tell which characters a token stands for.
    """
    if not encoder.tokenizer.is_fast:
        raise ModelError(
            "assistant_only_loss needs a fast tokenizer",
            where=type(encoder.tokenizer).__name__,
            remedy="load it with use_fast=True",
        )
    one = _from_markers if has_markers(encoder) else _from_prefixes
    out: list[Masked | BadRow] = []
    for conversation, row in zip(conversations, rows, strict=True):
        arguments = encoder.arguments(row)
        settled = encoder.settled(conversation, arguments)
        result = encoder.checked(settled, row, arguments) or one(encoder, settled, arguments)
        if not isinstance(result, BadRow) and 1 not in result[1]:
            result = BadRow(
                "no_assistant_tokens",
                "messages",
                "the chat template marks no token as the assistant's",
                remedy="add an assistant turn, correct the template's {% generation %}, or set on_bad_rows: skip",
            )
        out.append(result)
    return out


def _from_markers(encoder: Encoder, conversation: list[Message], arguments: Mapping[str, Any]) -> Masked | BadRow:
    call: Any = encoder.tokenizer.apply_chat_template
    encoder.require_template(arguments)
    try:
        encoded = call(conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **arguments)
    except Exception as error:  # a template may raise anything
        return template_error(error)
    return list(encoded["input_ids"]), list(encoded["assistant_masks"])


def _from_prefixes(encoder: Encoder, conversation: list[Message], arguments: Mapping[str, Any]) -> Masked | BadRow:
    spans = turn_spans(encoder, conversation, arguments)
    if isinstance(spans, BadRow):
        return spans
    (text,) = encoder.render([conversation], arguments, False)
    encoded = encoder.tokenizer(text, add_special_tokens=False)
    mask = [0] * len(encoded["input_ids"])
    for start, end in spans:
        tokens = [token for token in map(encoded.char_to_token, range(start, end)) if token is not None]
        if tokens:
            mask[tokens[0] : tokens[-1] + 1] = [1] * (tokens[-1] + 1 - tokens[0])
    return list(encoded["input_ids"]), mask


def turn_spans(
    encoder: Encoder, conversation: list[Message], arguments: Mapping[str, Any]
) -> list[tuple[int, int]] | BadRow:
    """First and last-plus-one character of every assistant turn in the rendered conversation.

    Args:
        encoder: Tokenizer and template.
        conversation: Messages.
        arguments: Arguments of the template.

    Returns:
        Spans in the text, or a :class:`BadRow`.
    """

    def render(turns: list[Message], open_turn: bool) -> str:
        (text,) = encoder.render([turns], arguments, open_turn)
        if isinstance(text, BadRow):
            raise text
        return text

    try:
        full = render(conversation, False)
        spans = []
        for i, message in enumerate(conversation):
            if message.get("role") != "assistant":
                continue
            upto = full if i == len(conversation) - 1 else render(conversation[: i + 1], False)
            before = render(conversation[:i], False) if i else ""
            if not full.startswith(upto) or not full.startswith(before):
                special = sorted(encoder.tokenizer.get_added_vocab(), key=len, reverse=True)
                return _spans_up_to_marks(render, conversation, full, special) or _unstable_template()
            start = _turn_start(render, conversation[:i], full, before)
            spans.append((start, max(start, len(upto))))
        return spans
    except BadRow as bad:
        return bad


def _turn_start(render: Any, earlier: list[Message], full: str, before: str) -> int:
    if earlier:
        opened = render(earlier, True)
        # A template may put more into the generation prompt than into the finished turn, for example a thinking tag.
        return max(common_prefix(opened, full), len(before))
    # No turn stands before it, and templates cannot render nothing: learn the turn's header from another conversation.
    other = [{"role": "user", "content": "."}]
    header = render(other, True).removeprefix(render(other, False))
    position = full.find(header) if header else -1
    return position + len(header) if position >= 0 else 0


def _spans_up_to_marks(
    render: Any, conversation: list[Message], full: str, special: Sequence[str]
) -> list[tuple[int, int]] | None:
    """Assistant turns, found by a mark at the end of what each says; ``None`` where that does not work.

    A turn begins behind the generation prompt, or as much of it as earlier turns have (a thinking tag may be missing
    there). It ends with the special token that the template writes behind the answer, and the last one with the text.
    """
    answers = [i for i, message in enumerate(conversation) if message.get("role") == "assistant"]
    pieces = _pieces(render, conversation, answers, full)
    if pieces is None or not answers[0]:
        return None
    before = conversation[: answers[0]]
    opened = render(before, True)
    header = opened[common_prefix(opened, render(before, False)) :]
    spans, position = [], 0
    for piece in pieces:
        opening = next((header[:k] for k in range(len(header), 0, -1) if header[:k] in piece), "")
        if 2 * len(opening) <= len(header) or piece.count(opening) != 1:
            return None
        begin = position + piece.index(opening) + len(opening)
        position += len(piece)
        spans.append((begin, _closed(full, position, special)))
    if answers[-1] == len(conversation) - 1:
        spans[-1] = (spans[-1][0], len(full))
    return spans


def _pieces(render: Any, conversation: list[Message], answers: list[int], full: str) -> list[str] | None:
    """The rendering, cut behind what each answer says: that with marks there, which without them has to be the same."""
    if any(not isinstance(conversation[i].get("content"), str) for i in answers):
        return None
    for strip in (False, True):  # many templates strip answers, and a mark would keep their last spaces
        turns = list(conversation)
        for i in answers:
            said = conversation[i]["content"]
            turns[i] = {**turns[i], "content": (said.rstrip() if strip else said) + _MARK}
        marked: str = render(turns, False)
        *pieces, rest = marked.split(_MARK)
        if len(pieces) == len(answers) and "".join(pieces) + rest == full:
            return pieces
    return None


def _closed(text: str, end: int, special: Sequence[str]) -> int:
    """Where the special token at ``end`` is over, with a line break behind it; ``end`` itself where there is none."""
    for token in special:
        if text.startswith(token, end):
            after = end + len(token)
            return after + text.startswith("\n", after)
    return end


def _unstable_template() -> BadRow:
    return BadRow(
        "template_changes_earlier_turns",
        "messages",
        "the chat template renders earlier turns differently once others follow, so assistant turns cannot be located",
        remedy="use a template with {% generation %} markers, or set assistant_only_loss: false",
    )
