"""Turns of a conversation, however they are written: names of roles and fields, parts, tool calls, JSON as text."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import BadRow, Message, need, not_text

#: Roles that chat templates know. Other names are translated to these first.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

#: What other formats call the roles.
ROLE_NAMES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
#: Names of the two fields of a turn, the usual ones first.
ROLE_KEYS = ("role", "from", "speaker")
TEXT_KEYS = ("content", "value", "text")
#: Columns of what is asked. An answer may be JSON itself.
_ASKING = (
    *("prompt", "question", "instruction", "query", "input", "problem", "context", "history", "messages"),
    *("conversation", "conversations", "dialogue", "dialog", "turns"),
)
#: Roles of a turn that is a tool call written as text.
_CALLS = ("function_call", "tool_call")
#: Types of a part of a turn that is text.
_TEXT_TYPES = ("text", "input_text", "output_text", None)

_STRUCTURE = re.compile(r"\s*\"?(?:array\()?\[?\s*\{\s*\\?['\"](?:role|from|content|value|speaker)\\?['\"]\s*:")
_BETWEEN_ITEMS = re.compile(r"\}\s*\n\s*\{")


def is_turn(value: Any) -> bool:
    """Whether ``value`` is one turn: a role and what was said."""
    if not isinstance(value, Mapping) or not any(key in value for key in ROLE_KEYS):
        return False
    return any(key in value for key in (*TEXT_KEYS, "tool_calls", "function_call"))


def is_messages(value: Any) -> bool:
    """Whether ``value`` is a non-empty list of turns, whatever its fields are called."""
    return isinstance(value, list) and bool(value) and is_turn(value[0])


def is_exchanges(value: Any) -> bool:
    """Whether ``value`` is a list of questions with their answers, as XTuner and Capybara write conversations."""
    return isinstance(value, list) and bool(value) and all(map(_is_exchange, value))


def _is_exchange(value: Any) -> bool:
    return isinstance(value, Mapping) and {"input", "output"} <= value.keys() and not is_turn(value)


def _exchanged(items: list[Any]) -> list[Any]:
    turns: list[Any] = []
    for item in items:
        told = (("system", item.get("system")), ("user", item["input"]), ("assistant", item["output"]))
        turns += [{"role": role, "content": text} for role, text in told if text or (role == "user" and text is None)]
    return turns


def decoded(value: Any, field: str) -> Any:
    """A conversation that is stored as text (JSON, or what Python prints) as the list it was; all else unchanged.

    Raises:
        BadRow: The text is plainly such a conversation, and cannot be read.
    """
    if not isinstance(value, str) or not _STRUCTURE.match(value):
        return value
    found = parsed(value)
    found = parsed(found) if isinstance(found, str) and found != value else found
    if is_messages(found) or _is_lone_turn(found, field):
        return found
    # JSON of another kind is an answer like any other, and so is what only begins as a structure does.
    if not isinstance(found, str) or value.lstrip().startswith("{") or value.rstrip()[-1] not in "]})\"'":
        return value
    raise BadRow(
        "unreadable_structure",
        field,
        f"{field!r} is a conversation stored as text that is neither JSON nor Python",
        value=value[:60],
        remedy="store it as JSON, or set on_bad_rows: skip",
    )


def _is_lone_turn(value: Any, field: str) -> bool:
    """Whether a decoded object is a turn: what is asked may be anybody's, an answer only the model's."""
    if not is_turn(value):
        return False
    role = ROLE_NAMES.get(str(next(value[key] for key in ROLE_KEYS if key in value)).strip().lower())
    return role == "assistant" or (role is not None and field in _ASKING)


def parsed(text: str) -> Any:
    """What JSON text or the text of a Python value holds; the text itself where it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    # numpy prints items without commas, and pandas writes that into CSV.
    without_array = re.sub(r"^\s*array\((.*?)(?:,\s*dtype=object)?\)\s*$", r"\1", text, flags=re.DOTALL)
    for candidate in (text, _BETWEEN_ITEMS.sub("}, {", without_array)):
        try:
            return ast.literal_eval(candidate.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return text


def decode_columns(row: Mapping[str, Any], used: Collection[str] | None = None) -> dict[str, Any]:
    """A row whose conversations are no longer text.

    Args:
        row: The row as it was read.
        used: Columns that something reads; what the others hold cannot make the row a bad one.

    Raises:
        BadRow: See :func:`decoded`.
    """
    out: dict[str, Any] = {}
    for field, value in row.items():
        try:
            out[field] = _present(value, field)
        except BadRow:
            if used is None or field in used:
                raise
            out[field] = value
    for field in ("prompt", "chosen", "rejected", "completion", "messages", "conversations"):
        whole = _conversation_within(out.get(field))
        if whole is not None:
            out[field] = whole["messages"]
            out |= {"tools": out.get("tools") or whole.get("tools")} if whole.get("tools") else {}
    return out


def _present(value: Any, field: str) -> Any:
    """A value as it was meant: a conversation in place of its text, null in place of the NaN of tables of numbers."""
    if isinstance(value, str):
        return decoded(value, field)
    return None if isinstance(value, float) and math.isnan(value) else value


def _conversation_within(value: Any) -> Mapping[str, Any] | None:
    """An answer that is a whole record of a conversation: its messages, and the tools that were there."""
    was_text = isinstance(value, str)
    if was_text and value.lstrip().startswith("{") and "messages" in value:
        value = parsed(value)
    if not isinstance(value, Mapping) or not is_messages(value.get("messages")):
        return None
    # Text that nobody answers in is a call that the model writes.
    last = value["messages"][-1]
    answers = is_turn(last) and message(last, "messages")["role"] == "assistant"
    return value if answers or not was_text else None


def need_text_or_messages(row: Mapping[str, Any], field: str) -> str | list[Message]:
    """The value of ``field``: a string, a list of messages, or one message (made a list)."""
    value = need(row, field)
    text = text_of_parts(value)
    if text is not None:
        return text
    return value if isinstance(value, str) else need_messages(row, field)


def text_of_parts(value: Any, fields: Collection[str] = ("type", "text")) -> str | None:
    """The text of a list of nothing but parts of text; ``None`` where it is anything else.

    Args:
        value: A value of a row.
        fields: What a part has, and nothing else.
    """
    if not isinstance(value, list) or not value:
        return None
    parts = [part for part in value if isinstance(part, Mapping) and part.keys() == {*fields}]
    texts = [part["text"] for part in parts if part.get("type", "text") == "text" and isinstance(part["text"], str)]
    return "".join(texts) if len(texts) == len(value) else None


def need_messages(row: Mapping[str, Any], field: str) -> list[Message]:
    """The messages of ``field`` with ``role`` and ``content``, whatever their fields and roles are called."""
    value = need(row, field)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise not_text(field, value)
    if not value:
        raise BadRow("empty_messages", field, f"{field!r} holds no messages", remedy="add a message or remove the row")
    if all(isinstance(item, str) for item in value):
        raise not_text(field, value)
    return [message(item, field) for item in (_exchanged(value) if is_exchanges(value) else value)]


def message(item: Any, field: str) -> Message:
    """One turn with ``role`` and ``content``.

    Raises:
        BadRow: It has no role, or holds no text.
    """
    if not isinstance(item, Mapping):
        raise not_text(field, item)
    role_key = next((key for key in ROLE_KEYS if item.get(key) is not None), None)
    text_key = next((key for key in TEXT_KEYS if key in item), None)
    calls = item.get("tool_calls") or item.get("function_call")
    if role_key is None or (text_key is None and not calls):
        raise BadRow(
            "malformed_message",
            field,
            f"a message in {field!r} has neither role and content nor from and value",
            value=item,
            remedy="write messages as {role, content}",
        )
    used = (role_key, text_key, "tool_calls", "function_call")
    rest = {key: value for key, value in item.items() if key not in used and value is not None}
    role = str(item[role_key])
    if role in _CALLS:
        return {"role": "assistant", "tool_calls": tool_calls(item[str(text_key)], field), **rest}
    out: Message = {"role": ROLE_NAMES.get(role.strip().lower(), role)}
    if text_key is not None:
        out["content"] = _content(item[text_key])
        if out["role"] == "tool" and isinstance(out["content"], Mapping):
            # What a tool returned, as the object that it was.
            out["content"] = json.dumps(out["content"], ensure_ascii=False)
    out |= rest
    if calls:
        out["tool_calls"] = tool_calls(calls, field)
    return out


def _content(value: Any) -> Any:
    """Text, or a list of text parts in the form that templates know; all else unchanged, to be refused later."""
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list):
        return value
    parts = []
    for part in items:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif isinstance(part, Mapping) and part.get("type") in _TEXT_TYPES and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            return value
    return parts


def tool_calls(value: Any, field: str) -> list[Any]:
    """Tool calls as templates know them, with arguments that are a mapping where they were JSON text.

    Raises:
        BadRow: Calls that are text, and no JSON.
    """
    calls = value
    if isinstance(value, str):
        calls = parsed(value)
        if isinstance(calls, str):
            raise BadRow(
                "malformed_message", field, "a function_call is not JSON", value=value, remedy="write it as JSON"
            )
    return [_call(one) for one in (calls if isinstance(calls, list) else [calls])]


def _call(value: Any) -> Any:
    call = parsed(value) if isinstance(value, str) else value
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"])}
    if "name" in call:
        return {"type": "function", "function": _with_arguments(call)}
    return dict(call)


def _with_arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(function)
    if isinstance(out.get("arguments"), str):
        arguments = parsed(out["arguments"]) if out["arguments"].strip() else {}
        # Text that is no mapping is what the model wrote, broken or not.
        if isinstance(arguments, Mapping):
            out["arguments"] = arguments
    return out
