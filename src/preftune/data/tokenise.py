"""Text and messages to token ids, in batches: chat template, boundary, beginning- and end-of-sequence tokens.

Token ids and the boundary between prompt and completion are those of TRL 1.16's ``DPOTrainer`` and ``SFTTrainer``. TRL
calls the tokenizer three times per row; here all texts of a batch go through it in one call, each distinct text once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from preftune.data.formats.base import BadRow, Message, Row, common_prefix
from preftune.data.rendering import Renderings, tools_lost
from preftune.data.truncation import Ids, TokenPair
from preftune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Arguments of `apply_chat_template` itself rather than variables of the template. A row that sets one is rendered and
# tokenised by a call of its own, which gives it exactly the meaning that it has in TRL.
_CALL_ARGUMENTS = frozenset(
    {
        "add_generation_prompt",
        "continue_final_message",
        "documents",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)


#: Masks of both completions of a pair.
Masks: TypeAlias = tuple[list[int] | None, list[int] | None]


@dataclass(frozen=True)
class TokenisedPair:
    """A pair before truncation, with what was noticed on the way.

    Attributes:
        ids: Token ids.
        merged: End of the tokenised prompt that the full sequences do not contain; empty where the boundary is clean.
        doubled_bos: A second beginning-of-sequence token was removed.
        eos_missing: At least one completion does not end with the end-of-sequence token of its own accord.
        masks: 1 for every token of a completion that the model writes; ``None`` where it writes all.
    """

    ids: TokenPair
    merged: Ids
    doubled_bos: bool
    eos_missing: bool
    masks: Masks = (None, None)


class Encoder:
    """A tokenizer with the chat template to use.

    Args:
        tokenizer: Tokenizer of the model.
        chat_template: Template to use instead of the tokenizer's own.
        keeps_lost: A conversation whose rendering lacks a turn's text is used as it is, and noted in ``lost``.

    Attributes:
        lost: What is missing in the rendering of a row, by the ``id`` of the row.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, *, keeps_lost: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.keeps_lost = keeps_lost
        self.lost: dict[int, BadRow] = {}
        self._probed: dict[str, bool] = {}

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self.tokenizer.chat_template is not None or self.chat_template is not None

    def encode(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        """Token ids of many texts.

        Args:
            texts: Texts.
            special: Whether the tokenizer adds its own special tokens: yes for plain text; no for rendered templates,
                which write them themselves.

        Returns:
            One list of ids per text.
        """
        unique = list(dict.fromkeys(texts))
        if not unique:
            return []
        encoded: Any = self.tokenizer(
            unique,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        known = dict(zip(unique, encoded, strict=True))
        return [known[text] for text in texts]

    def arguments(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that a row adds to ``apply_chat_template``."""
        tools = row.get("tools")
        out = {"tools": json.loads(tools) if isinstance(tools, str) and tools else tools}
        if self.chat_template is not None:
            out["chat_template"] = self.chat_template
        return {**out, **(row.get("chat_template_kwargs") or {})}

    def conversations(
        self, conversations: Sequence[Any], rows: Sequence[Row], *, generation_prompt: bool
    ) -> list[Ids | BadRow]:
        """Token ids of rendered conversations.

        Args:
            conversations: Lists of messages.
            rows: The row each belongs to, for its tools and template arguments.
            generation_prompt: Whether the template opens an assistant turn at the end.

        Returns:
            Token ids per conversation, or a :class:`BadRow` where the template failed.
        """
        out: list[Any] = [None] * len(conversations)
        texts: dict[int, str] = {}
        for indices, arguments in self._groups(rows):
            if _CALL_ARGUMENTS & set(arguments):
                for i in indices:
                    out[i] = self._one_call(conversations[i], arguments, generation_prompt)
                continue
            rendered = self.render([conversations[i] for i in indices], arguments, generation_prompt)
            forms = self._forms(arguments, generation_prompt)
            for i, first in zip(indices, rendered, strict=True):
                messages, text = forms.settle(conversations[i], first)
                if isinstance(text, str) and not generation_prompt:
                    text = self._checked(messages, text, rows[i], arguments)
                if isinstance(text, str):
                    texts[i] = text
                else:
                    out[i] = text
        for i, ids in zip(texts, self.encode(list(texts.values()), special=False), strict=True):
            out[i] = ids
        return out

    def settled(self, conversation: list[Message], arguments: Mapping[str, Any]) -> list[Message]:
        """A conversation in the form that the template keeps the text of; see :class:`Renderings`."""
        return self._forms(arguments, False).settle(conversation)[0]

    def _forms(self, arguments: Mapping[str, Any], generation_prompt: bool) -> Renderings:
        key = f"{generation_prompt}{arguments!r}" if arguments.get("tools") or len(arguments) > 1 else ""
        return Renderings(lambda one: self.render([one], arguments, generation_prompt)[0], key, self._probed)

    def checked(self, messages: list[Message], row: Row, arguments: Mapping[str, Any]) -> BadRow | None:
        """What is wrong with the rendering of a settled conversation, unless such rows are kept and noted."""
        (text,) = self.render([messages], arguments, False)
        found = text if isinstance(text, BadRow) else self._checked(messages, text, row, arguments)
        return found if isinstance(found, BadRow) else None

    def _checked(self, messages: list[Message], text: str, row: Row, arguments: Mapping[str, Any]) -> str | BadRow:
        bad = self._forms(arguments, False).lost(messages, text) or tools_lost(arguments.get("tools"), text)
        if bad is None or not self.keeps_lost:
            return bad or text
        self.lost[id(row)] = bad
        return text

    def _groups(self, rows: Sequence[Row]) -> list[tuple[list[int], dict[str, Any]]]:
        groups: dict[str, tuple[list[int], dict[str, Any]]] = {}
        for i, row in enumerate(rows):
            tools, kwargs = row.get("tools"), row.get("chat_template_kwargs")
            key = f"{tools!r}{kwargs!r}" if tools or kwargs else ""
            if key not in groups:
                groups[key] = ([], self.arguments(row))
            groups[key][0].append(i)
        return list(groups.values())

    def render(
        self, conversations: Sequence[Any], arguments: Mapping[str, Any], generation_prompt: bool
    ) -> list[str | BadRow]:
        """Conversations as text; a :class:`BadRow` where the template failed."""
        self.require_template(arguments)
        try:
            return list(self._template(list(conversations), generation_prompt, arguments))
        except Exception as error:  # a template may raise anything
            if len(conversations) == 1:
                return [template_error(error)]
        return [self.render([one], arguments, generation_prompt)[0] for one in conversations]

    def _template(self, conversations: Any, generation_prompt: bool, arguments: Mapping[str, Any]) -> Any:
        return self.tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=generation_prompt, **arguments
        )

    def _one_call(self, conversation: Any, arguments: Mapping[str, Any], generation_prompt: bool) -> Any:
        extra = {"add_generation_prompt": True} if generation_prompt else {}
        try:
            call: Any = self.tokenizer.apply_chat_template
            return list(call(conversation, tokenize=True, return_dict=True, **extra, **arguments)["input_ids"])
        except Exception as error:
            return template_error(error)

    def require_template(self, arguments: Mapping[str, Any]) -> None:
        """Refuse conversations where there is no chat template.

        Raises:
            ModelError: Names the ways to get one.
        """
        if self.tokenizer.chat_template is None and "chat_template" not in arguments:
            raise ModelError(
                "the rows are conversations, but the tokenizer has no chat template",
                where=str(self.tokenizer.name_or_path or "tokenizer"),
                remedy="set chat_template, use the tokenizer of an instruction-tuned model, or give plain text",
            )

    def drop_doubled_bos(self, ids: Ids) -> Ids:
        """Ids without the second of two beginning-of-sequence tokens."""
        bos = self.tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def with_eos(self, text: str) -> str:
        """Plain text that ends with the end-of-sequence token.

        Raises:
            ModelError: The tokenizer has none.
        """
        eos = self.tokenizer.eos_token
        if not isinstance(eos, str):
            raise ModelError(
                "the tokenizer has no end-of-sequence token, so a model could not learn to stop",
                where=str(self.tokenizer.name_or_path or "tokenizer"),
                remedy="set tokenizer.eos_token",
            )
        return text if text.endswith(eos) else text + eos

    def ends_with_eos(self, ids: Ids) -> bool:
        """Whether the end-of-sequence token is there, with nothing but white space after it."""
        eos = self.tokenizer.eos_token_id
        if eos is None or not ids:
            return False
        if ids[-1] == eos:
            return True
        # Templates write at most a line end after it; looking further would only find the end of an earlier turn.
        for position in range(len(ids) - 2, max(-1, len(ids) - 5), -1):
            if ids[position] == eos:
                return not str(self.tokenizer.decode(ids[position + 1 :])).strip()
        return False

    def append_eos(self, ids: Ids) -> Ids:
        """Ids with the end-of-sequence token appended where there is one."""
        eos = self.tokenizer.eos_token_id
        return ids if eos is None else [*ids, eos]


def template_error(error: Exception) -> BadRow:
    """The bad row that a failing chat template stands for."""
    return BadRow(
        "template_error",
        "messages",
        f"the chat template failed: {type(error).__name__}: {error}",
        remedy="correct the row's turns or the template, or set on_bad_rows: skip",
    )


def sequences(
    encoder: Encoder, rows: Sequence[Row], fields: Sequence[str], *, enclosed: bool = False
) -> list[list[Ids] | BadRow]:
    """Token ids of each row's prompt alone, and of the prompt followed by each of ``fields``.

    Args:
        encoder: Tokenizer and template.
        rows: Canonical rows with a ``prompt``; all text or all messages per row.
        fields: ``("chosen", "rejected")`` or ``("completion",)``.
        enclosed: The sequences will be put between beginning- and end-of-sequence tokens: the tokenizer adds none of
            its own, and a prompt that ends with an assistant turn is continued, as in TRL's ORPO and CPO trainers.

    Returns:
        ``[prompt, prompt + field, ...]`` per row, with no doubled BOS removed yet, or a :class:`BadRow`.
    """
    texts = [i for i, row in enumerate(rows) if isinstance(row["prompt"], str)]
    chats = [i for i, row in enumerate(rows) if not isinstance(row["prompt"], str)]
    out: list[Any] = [None] * len(rows)
    flat = [rows[i]["prompt"] for i in texts]
    for field in fields:
        flat += [rows[i]["prompt"] + encoder.with_eos(rows[i][field]) for i in texts]
    encoded = encoder.encode(flat, special=not enclosed)
    for position, i in enumerate(texts):
        out[i] = encoded[position :: len(texts)]
    if chats:
        some = [rows[i] for i in chats]
        columns = [_opened(encoder, some, continued=enclosed)]
        for field in fields:
            whole = [[*row["prompt"], *row[field]] for row in some]
            columns.append(encoder.conversations(whole, some, generation_prompt=False))
        for i, parts in zip(chats, zip(*columns, strict=True), strict=True):
            out[i] = next((part for part in parts if isinstance(part, BadRow)), list(parts))
    return out


def _opened(encoder: Encoder, rows: Sequence[Row], *, continued: bool) -> list[Ids | BadRow]:
    """Prompts that open an assistant turn; with ``continued``, those that have opened one already are left open."""
    out = encoder.conversations([row["prompt"] for row in rows], rows, generation_prompt=True)
    for i, row in enumerate(rows):
        if continued and row["prompt"][-1].get("role") == "assistant":
            arguments = {**(row.get("chat_template_kwargs") or {}), "continue_final_message": True}
            one = {**row, "chat_template_kwargs": arguments}
            out[i] = encoder.conversations([row["prompt"]], [one], generation_prompt=False)[0]
    return out


def tokenise_pairs(
    encoder: Encoder, rows: Sequence[Row], append_eos: bool = False, *, enclosed: bool = False
) -> list[TokenisedPair | BadRow]:
    """Tokenise canonical preference rows.

    The completion starts where the tokenised prompt and the tokenised prompt with answer part; the earlier of the two
    places counts for both answers.

    Args:
        encoder: Tokenizer and template.
        rows: Checked canonical rows.
        append_eos: Append EOS to conversational completions whose template leaves it out.
        enclosed: See :func:`sequences`.

    Returns:
        One result per row; a :class:`BadRow` where the chat template failed.
    """
    out: list[TokenisedPair | BadRow] = []
    for row, parts in zip(rows, sequences(encoder, rows, ("chosen", "rejected"), enclosed=enclosed), strict=True):
        if isinstance(parts, BadRow):
            out.append(parts)
            continue
        plain = isinstance(row["prompt"], str)
        prompt, chosen, rejected = (encoder.drop_doubled_bos(ids) for ids in parts) if plain else parts
        doubled = plain and len(chosen) < len(parts[1])
        start = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
        answers = [chosen[start:], rejected[start:]]
        missing = [not encoder.ends_with_eos(ids) for ids in answers]
        if append_eos and not plain:
            answers = [encoder.append_eos(a) if m else a for a, m in zip(answers, missing, strict=True)]
        ids = TokenPair(prompt[:start], answers[0], answers[1])
        out.append(TokenisedPair(ids, prompt[start:], doubled, any(missing)))
    return out
