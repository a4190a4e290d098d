"""What a chat template made of a conversation, compared with what the conversation says.

Templates are written for one form of content. Given another they print the ``repr`` of a Python list, or ``None``, or
nothing, without an error. A conversation is therefore tried in the forms that people use, the given one first, until
every turn's text is in what was rendered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from preftune.data.formats.base import BadRow, Message

Render = Callable[[list[Message]], "str | BadRow"]

#: Texts shorter than this may be found by accident, in a header or in another turn.
_TELLING = 16
#: Fields of what was thought before an answer; templates know one of them or none.
REASONING = ("reasoning_content", "reasoning", "thinking")
#: Roles that templates may know under another name.
_OTHER_ROLES = {"developer": "system", "function": "tool", "ipython": "tool"}
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_BREAK = re.compile(r"\s+")


class Renderings:
    """Finds the form of a conversation that a template keeps the text of, and remembers which shapes it drops.

    Args:
        render: Conversation to text, or a :class:`BadRow` where the template fails.
        key: What the rendering depends on beside the conversation.
        probed: Results for shapes of conversations that were looked at earlier; shared between rows.
    """

    def __init__(self, render: Render, key: str = "", probed: dict[str, bool] | None = None) -> None:
        self.render = render
        self.key = key
        self.probed = {} if probed is None else probed

    def settle(
        self, conversation: list[Message], text: str | BadRow | None = None
    ) -> tuple[list[Message], str | BadRow]:
        """The form of a conversation to train on.

        Args:
            conversation: Messages.
            text: Its rendering, where that is known.

        Returns:
            The messages and their rendering; with them, in place of the text, a :class:`BadRow` where the template
            fails on every form. A rendering that lacks a turn's text is marked by :func:`lost`.
        """
        first = self.render(conversation) if text is None else text
        if isinstance(first, str) and _is_plain(conversation) and self._complete(conversation, first):
            return conversation, first
        best, shown = conversation, first
        for form in _forms(conversation):
            tried = first if form is conversation else self.render(form)
            if not isinstance(tried, str):
                continue
            if self._complete(form, tried) and not self._is_worse(form, tried):
                return form, tried
            # Where no form has all of the text, the first that shows text as text is judged.
            if isinstance(shown, str) and any(_prints_parts(turn, shown) for turn in best):
                best, shown = form, tried
        return best, shown

    def lost(self, conversation: list[Message], text: str) -> BadRow | None:
        """The bad row that a rendering is which lacks a turn's text; ``None`` where it has all."""
        if any(_prints_parts(turn, text) for turn in conversation):
            return BadRow(
                "text_lost",
                "messages",
                "the chat template prints the parts of a turn as Python does, and loses text where they are joined",
                value=text[:60],
                remedy="use a template that writes every turn as a whole",
            )
        if self._complete(conversation, text):
            return None
        for turn in conversation:
            wanted = [*pieces(turn), *(_thoughts(turn) if turn is conversation[-1] else ())]
            alone = [piece for piece in wanted if not _found(piece, text, 1)]
            if alone or turn is conversation[-1]:
                break
        said = f"what the {turn.get('role')} says" if alone else "a turn"
        return BadRow(
            "text_lost",
            "messages",
            f"the chat template leaves out {said}",
            value=(alone or [text])[0][:60],
            remedy="use a template that writes every role and form of content, or leave that turn out of the data",
        )

    def _complete(self, conversation: list[Message], text: str) -> bool:
        wanted: dict[str, int] = {}
        short = False
        for turn in conversation:
            # Thoughts before earlier answers are left out on purpose, as models are used.
            for piece in (*pieces(turn), *(_thoughts(turn) if turn is conversation[-1] else ())):
                wanted[piece] = wanted.get(piece, 0) + 1
                short = short or len(piece) < _TELLING
        if not all(_found(piece, text, count) for piece, count in wanted.items()):
            return False
        return not short or self._keeps_shape(conversation)

    def _keeps_shape(self, conversation: list[Message]) -> bool:
        """Whether the template writes every turn of such a conversation, tried with words found nowhere else."""
        shape = self.key + json.dumps([_shape(turn) for turn in conversation])
        if shape not in self.probed:
            words = iter(f"qx{number}zq{number * 7919 % 997}w" for number in range(10**6))
            probe = [_with_words(turn, words) for turn in conversation]
            text = self.render(probe)
            # A template that refuses the probe has its own view of words; the row itself is what counts.
            self.probed[shape] = isinstance(text, BadRow) or all(
                _found(piece, text, 1) for turn in probe for piece in pieces(turn)
            )
        return self.probed[shape]

    def _is_worse(self, form: list[Message], text: str) -> bool:
        """Whether a rendering shows how Python prints a value: of parts, of what is missing, or of a call."""
        if any(_printed(turn, text) for turn in form):
            return True
        if all(isinstance(turn.get("content", ""), str) for turn in form):
            return False
        joined = [_joined(turn) for turn in form]
        plain = self.render(joined)
        if not isinstance(plain, str) or not self._complete(joined, plain):
            return False
        return _BREAK.sub("", plain) != _BREAK.sub("", text)


def pieces(turn: Mapping[str, Any]) -> list[str]:
    """Texts of a turn that a rendering has to hold: what is said, names of called tools, text in their arguments."""
    content = turn.get("content")
    texts = [content] if isinstance(content, str) else [part["text"] for part in content or () if _is_text(part)]
    for call in turn.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if isinstance(function, Mapping):
            texts += [str(function["name"])] if function.get("name") else []
            texts += list(_strings(function.get("arguments")))
    return [text.strip() for text in texts if text.strip()]


def _thoughts(turn: Mapping[str, Any]) -> list[str]:
    return [turn[key].strip() for key in REASONING if isinstance(turn.get(key), str) and turn[key].strip()]


def tools_lost(tools: Any, text: str) -> BadRow | None:
    """The bad row that a rendering is which does not name the tools; ``None`` where it does, or there are none."""
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name not in text:
            return BadRow(
                "tools_lost",
                "tools",
                "the chat template does not write the tools",
                value=name,
                remedy="use a template that does (chat_template), or leave the column out (dataset_columns)",
            )
    return None


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            inner = None
        if isinstance(inner, Mapping):
            yield from _strings(inner)
        else:
            yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _found(piece: str, text: str, count: int) -> bool:
    if piece in text and (count == 1 or text.count(piece) >= count):
        return True
    # Written as JSON, as templates do with what tools return.
    for ascii_only in (False, True):
        if json.dumps(piece, ensure_ascii=ascii_only)[1:-1] in text:
            return True
    # Templates keep the thoughts of the last answer alone, as models are used.
    said = _THOUGHT.sub("", piece).strip()
    if "</think>" in said:
        said = said.rpartition("</think>")[2].strip()
    if said != piece:
        return not said or _found(said, text, count)
    return piece != text and _BREAK.sub("", piece) in _BREAK.sub("", text) and count == 1


def _prints_parts(turn: Mapping[str, Any], text: str) -> bool:
    content = turn.get("content")
    if not isinstance(content, list):
        return False
    dumps = (str, json.dumps, lambda part: json.dumps(part, ensure_ascii=False))
    return any(write(part) in text for part in content for write in dumps)


def _printed(turn: Mapping[str, Any], text: str) -> bool:
    if _prints_parts(turn, text):
        return True
    for call in turn.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if str(function) in text or (isinstance(arguments, Mapping) and arguments and str(arguments) in text):
            return True
        encoded = json.dumps(arguments)[1:-1] if isinstance(arguments, str) else ""
        if "\\" in encoded and encoded in text:
            return True
    return False


def _is_plain(conversation: Sequence[Mapping[str, Any]]) -> bool:
    return all(isinstance(turn.get("content"), str) and not turn.get("tool_calls") for turn in conversation)


def _forms(conversation: list[Message]) -> Iterator[list[Message]]:
    """A conversation as it is, with content as text, with tools' arguments as JSON text, with content as parts."""
    yield conversation
    joined = [_joined(turn) for turn in conversation]
    yield joined
    if any(turn.get("tool_calls") for turn in conversation):
        yield [_arguments_as_text(turn) for turn in conversation]
        yield [_arguments_as_text(turn) for turn in joined]
    yield [_as_parts(turn) for turn in joined]
    if any(turn.get("role") in _OTHER_ROLES for turn in joined):
        yield [{**turn, "role": _OTHER_ROLES.get(turn["role"], turn["role"])} for turn in joined]
    if any(_thoughts(turn) for turn in joined):
        for name in REASONING:
            yield [_thinking(turn, name) for turn in joined]


def _thinking(turn: Message, name: str) -> Message:
    """A turn with its thoughts under another name."""
    thoughts = _thoughts(turn)
    return (
        {**{key: value for key, value in turn.items() if key not in REASONING}, name: thoughts[0]} if thoughts else turn
    )


def _joined(turn: Message) -> Message:
    content = turn.get("content")
    if isinstance(content, list):
        return {**turn, "content": "".join(part["text"] for part in content if _is_text(part))}
    return {**turn, "content": ""} if content is None else turn


def _as_parts(turn: Message) -> Message:
    content = turn.get("content")
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


def _arguments_as_text(turn: Message) -> Message:
    if not turn.get("tool_calls"):
        return turn
    return {**turn, "tool_calls": [_call_as_text(call) for call in turn["tool_calls"]]}


def _call_as_text(call: Any) -> Any:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    function = dict(call["function"])
    if isinstance(function.get("arguments"), Mapping):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}


def _shape(turn: Mapping[str, Any]) -> list[Any]:
    content = turn.get("content")
    form = len(content) if isinstance(content, list) else (type(content).__name__ if not content else "text")
    calls = [sorted(_names(call)) for call in turn.get("tool_calls") or ()]
    return [turn.get("role"), form, sorted(turn), calls]


def _names(call: Any) -> list[str]:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    return [str(key) for key in arguments] if isinstance(arguments, Mapping) else [type(arguments).__name__]


def _with_words(turn: Message, words: Iterator[str]) -> Message:
    content = turn.get("content")
    out = dict(turn)
    if isinstance(content, str) and content.strip():
        out["content"] = next(words)
    elif isinstance(content, list):
        out["content"] = [{**part, "text": next(words)} if _is_text(part) else part for part in content]
    return out
