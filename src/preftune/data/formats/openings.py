"""What stands before an answer: system turn, history, question, and the columns that hold them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import BadRow, Message, common_prefix, optional_text
from preftune.data.formats.turns import is_messages, need_messages, need_text_or_messages, parsed, text_of_parts

#: Columns of a system turn, in the order in which they are looked for.
SYSTEMS = ("system", "system_prompt", "system_message")
#: Columns whose text stands below a question.
BELOW = ("input", "context")
#: What tables of texts write where there is none.
_NOTHING = ("nan", "none", "null", "<na>", "n/a", "#n/a")


def opening(row: Mapping[str, Any]) -> list[Message]:
    """What the columns ``system`` and ``history`` put before a conversation.

    Raises:
        BadRow: They hold something else.
    """
    return [*system_turn(row), *_history(row)]


def system_turn(row: Mapping[str, Any]) -> list[Message]:
    """The ``system`` column (or one of another name) as a list of no or one message."""
    said = {name: text for name in SYSTEMS if _says(text := _system_text(row, name))}
    if len(set(said.values())) > 1:
        raise BadRow(
            "two_system_turns",
            list(said)[1],
            f"the columns {' and '.join(said)} hold different system turns",
            remedy="keep one of the columns",
        )
    return [{"role": "system", "content": text} for text in list(said.values())[:1]]


def _system_text(row: Mapping[str, Any], name: str) -> str:
    # Some services write it as a list of parts.
    return text_of_parts(row.get(name), ["text"]) or text_of_parts(row.get(name)) or optional_text(row, name)


def _says(text: str) -> bool:
    return bool(text) and text.strip().lower() not in _NOTHING


def question(row: Mapping[str, Any], name: str) -> str | list[Message]:
    """A question with the text that belongs below it, such as Alpaca's ``input`` and Dolly's ``context``.

    Args:
        row: A row.
        name: The column of the question.

    Returns:
        Text, or messages where the question is messages. A conversation in ``context`` comes before it.

    Raises:
        BadRow: They hold something else.
    """
    asks = need_text_or_messages(row, name)
    below = [other for other in BELOW if other != name and row.get(other) is not None]
    before = [turn for other in below if is_messages(row[other]) for turn in need_messages(row, other)]
    texts = [text for other in below if not is_messages(row[other]) and _says(text := _text_below(row, other))]
    if isinstance(asks, str):
        # A question that was put together holds them already.
        texts = [text for text in texts if not re.search(rf"(?<!\w){re.escape(text.strip())}(?!\w)", asks)]
    if not isinstance(asks, str):
        return [*before, *_with_below(asks, texts)]
    text = "\n".join(part for part in (asks, *texts) if part)
    return [*before, *asked(text)] if before else text


def _text_below(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    # A number is text here, as it is in a question.
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else optional_text(row, name)


def _with_below(turns: list[Message], texts: list[str]) -> list[Message]:
    """A question of messages, with text below its last turn, or as a turn of its own below an answer."""
    if not texts:
        return turns
    last = turns[-1]
    if last.get("role") == "user" and isinstance(last.get("content"), str):
        return [*turns[:-1], {**last, "content": "\n".join((last["content"], *texts))}]
    return [*turns, *asked("\n".join(texts))]


def questioned(row: Mapping[str, Any], name: str) -> list[Message]:
    """A question as messages, after the row's ``system`` and ``history``.

    Raises:
        BadRow: See :func:`question` and :func:`opened`.
    """
    rest = {key: value for key, value in row.items() if key != name}
    return opened(rest, asked(question(row, name)))


def _history(row: Mapping[str, Any]) -> list[Message]:
    given = row.get("history") or []
    if isinstance(given, str):
        given = parsed(given) if _says(given) else []
    if is_messages(given):
        return need_messages({"history": given}, "history")
    turns: list[Message] = []
    for turn in given if isinstance(given, list | tuple) else [given]:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise BadRow(
                "malformed_message",
                "history",
                "'history' must hold [question, answer] pairs",
                value=turn,
                remedy="write history as [[question, answer], ...]",
            )
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return turns


def opened(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """A conversation after the row's ``system`` and ``history``.

    Raises:
        BadRow: The conversation begins with another system turn than the column holds.
    """
    before = opening(row)
    if before and before[0]["role"] == "system" and turns and turns[0].get("role") == "system":
        if turns[0].get("content") != before[0]["content"]:
            raise BadRow(
                "two_system_turns",
                "system",
                "the row has a system column and a system turn",
                remedy="keep one of the two",
            )
        turns = turns[1:]
    return [*before, *turns]


def has_opening(row: Mapping[str, Any]) -> bool:
    """Whether the row has a column of what stands before its prompt."""
    return any(name in row for name in (*SYSTEMS, "history"))


def answer(value: str | list[Message]) -> list[Message]:
    """An answer as messages."""
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def asked(value: str | list[Message]) -> list[Message]:
    """A prompt as messages."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def alike(prompt: Any, *answers: Any) -> tuple[Any, ...]:
    """Prompt and answers as messages where one side is: answers of text below messages, and the other way round."""
    if not isinstance(prompt, str) and all(isinstance(one, str) for one in answers):
        return (prompt, *map(answer, answers))
    if isinstance(prompt, str) and answers and not any(isinstance(one, str) for one in answers):
        return (asked(prompt), *answers)
    return (prompt, *answers)


def prompted(row: Mapping[str, Any], prompt: str | list[Message], *answers: Any) -> tuple[Any, ...]:
    """Prompt and answers with ``system`` and ``history`` before them; a row that has those columns becomes messages.

    Answers of messages that begin with the prompt once more, or that are whole conversations with the prompt in them,
    lose it.

    Raises:
        BadRow: See :func:`opened`.
    """
    prompt, *rest = alike(prompt, *answers)
    if not isinstance(prompt, str):
        prompt, rest = _without_conversation(prompt, rest)
    if has_opening(row) and (not isinstance(prompt, str) or all(isinstance(one, str) for one in answers)):
        prompt, *rest = alike(opened(row, asked(prompt)), *rest)
    return (prompt, *rest)


def _without_conversation(prompt: list[Message], answers: list[Any]) -> tuple[list[Message], list[Any]]:
    """Prompt and answers where the answers are whole conversations: these up to the prompt, and what comes after it."""
    lists = all(isinstance(one, list) and len(one) > 1 and one[0].get("role") != "assistant" for one in answers)
    if not answers or not prompt or not lists:
        return prompt, answers
    several, asks = [list(map(_said, one)) for one in answers], _spoken(prompt)
    most = min(min(len(one) - 1, common_prefix(several[0], one)) for one in several)
    before = [[turn for turn in several[0][:n] if turn[0] != "system"] for n in range(most + 1)]
    end = next((n for n in range(1, most + 1) if asks and before[n][-len(asks) :] == asks), 0)
    if end:
        systems = [turn for turn in prompt if turn.get("role") == "system"]
        inside = [turn for turn in answers[0][:end] if turn.get("role") == "system"]
        if systems and inside and list(map(_said, systems)) != list(map(_said, inside)):
            raise BadRow(
                "two_system_turns",
                "prompt",
                "prompt and answers have different system turns",
                remedy="keep one of them",
            )
        return [*(() if inside else systems), *answers[0][:end]], [one[end:] for one in answers]
    # Answers that begin with the last turns of the prompt.
    end = next((n for n in range(most, 0, -1) if before[n] and asks[-len(before[n]) :] == before[n]), 0)
    return prompt, [one[end:] for one in answers] if end else answers


def _said(turn: Message) -> tuple[str, str]:
    """Who says what, however it is written down."""
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return str(turn.get("role")), str(content).replace("\r\n", "\n").strip()


def _spoken(turns: list[Message]) -> list[tuple[str, str]]:
    return [_said(turn) for turn in turns if turn.get("role") != "system"]


def shared_turns(first: list[Message], second: list[Message]) -> int:
    """How many turns two conversations begin with in common, whatever else is noted about a turn.

    The last turn of each is an answer, and shared by none.
    """
    several = [[(*_said(turn), repr(turn.get("tool_calls"))) for turn in turns] for turns in (first, second)]
    return min(common_prefix(*several), len(first) - 1, len(second) - 1)


def unanswered(turns: list[Message], field: str, *answers: list[Message]) -> list[Message]:
    """A prompt that ends with one of its own answers, without it.

    Raises:
        BadRow: It ends with another answer, so that nothing is left to answer.
    """
    if turns[-1].get("role") != "assistant" or len(turns) == 1:
        return turns
    if any(len(one) == 1 and _said(one[0]) == _said(turns[-1]) for one in answers):
        return turns[:-1]
    raise BadRow(
        "prompt_ends_with_answer",
        field,
        f"{field!r} ends with an answer that is neither the chosen nor the rejected one",
        value=turns[-1].get("content"),
        remedy="end it with the turn that is to be answered, or set on_bad_rows: skip",
    )


def last_answer(turns: list[Message], field: str) -> tuple[list[Message], list[Message]]:
    """A conversation divided before its last run of turns that begins with the assistant.

    Raises:
        BadRow: It ends with another turn.
    """
    if turns[-1].get("role") != "assistant" or len(turns) == 1:
        raise BadRow(
            "no_answer",
            field,
            f"{field!r} does not end with an answer to something",
            value=turns[-1].get("role"),
            remedy="end it with an assistant turn, or set on_bad_rows: skip",
        )
    return turns[:-1], turns[-1:]


def is_two_texts(value: Any) -> bool:
    """Whether a value is a list of two texts."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
