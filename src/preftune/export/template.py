"""A chat template taken apart: what comes before and after each message, as tools without Jinja need it.

Nothing is guessed from the template's text. It is rendered with marked messages, the pieces are read off, and they
count only if they put together what the template makes of other conversations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Messages = Sequence[Mapping[str, str]]
_ROLES = ("system", "user", "assistant")
_MARKS = ("MARKone", "MARKtwo", "MARKthree")


@dataclass(frozen=True)
class Pieces:
    """Text around messages.

    Attributes:
        around: Text before and after a message, by role; ``system`` is missing where the template has none.
        default: Text in front of conversations that begin without a system message.
        opening: What an answer begins after.
    """

    around: Mapping[str, tuple[str, str]]
    default: str
    opening: str

    def render(self, messages: Messages) -> str:
        """Put a conversation together, up to where the next answer begins."""
        text = "" if messages[0]["role"] == "system" else self.default
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.opening


def take_apart(tokenizer: Any) -> Pieces | str:
    """Find the pieces of a tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template. Where it begins every text with a begin-of-text token, runtimes do
            too, and the one in front of a conversation is left out.

    Returns:
        The pieces, or why there are none.
    """
    if not tokenizer.chat_template:
        return "the tokenizer has no chat template"
    one, two, three = _MARKS
    # Some models take the mark of a turn for their begin-of-text token, and add none.
    begin = tokenizer.bos_token if list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id] else None

    def render(*roles_and_texts: tuple[str, str], opened: bool = False) -> str:
        messages = [{"role": role, "content": text} for role, text in roles_and_texts]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened))
        return text.removeprefix(begin) if begin else text

    try:
        asked = render(("user", one))
        answered = render(("user", one), ("assistant", two))
        again = render(("user", one), ("assistant", two), ("user", three))
        opening = _rest(render(("user", one), opened=True), asked)
        assistant = _split(_rest(answered, asked), two)
        user = _split(_rest(again, answered), three)
        default = asked.split(one)[0].removesuffix(user[0])
        around = {"user": user, "assistant": assistant}
        told = _told(render, user[0])
        if told is not None:
            around["system"] = told
    except _Odd as odd:
        return str(odd)
    except Exception as error:  # whatever a template raises about roles and their order
        return f"the template refuses a plain conversation ({' '.join(str(error).split())[:120]})"
    pieces = Pieces(around, default, opening)
    return pieces if _agrees(pieces, render) else "the template treats messages differently by their place"


class _Odd(Exception):
    """The template is no sequence of messages with text around them."""


def _told(render: Any, user: str) -> tuple[str, str] | None:
    """Text around a system message; ``None`` where the template refuses one."""
    one, two, _ = _MARKS
    try:
        text = render(("system", one), ("user", two))
    except Exception:
        return None
    before, rest = _split(text, one)
    after = rest.split(two)[0]
    if not after.endswith(user):
        raise _Odd("the template puts the system message into the first question")
    return before, after[: len(after) - len(user)]


def _agrees(pieces: Pieces, render: Any) -> bool:
    talks = [
        (("user", "Why?"),),
        (("user", "One\n\ntwo"), ("assistant", "Three."), ("user", "Four: {x}"), ("assistant", "5"), ("user", "6")),
    ]
    if "system" in pieces.around:
        talks += [(("system", "Be brief.\nBe kind."), *talk) for talk in talks[:2]]
    for talk in talks:
        messages = [{"role": role, "content": text} for role, text in talk]
        if render(*talk, opened=True) != pieces.render(messages):
            return False
    return True


def _rest(text: str, start: str) -> str:
    if not text.startswith(start):
        raise _Odd("the template changes earlier messages when another one follows")
    return text[len(start) :]


def _split(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise _Odd("the template changes the text of messages")
    return before, after
