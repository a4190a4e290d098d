"""What tokenizer and chat template do to the rows: boundary, beginning and end, special tokens in the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from preftune.data.audit.proportions import share_of
from preftune.data.audit.report import Finding, Severity
from preftune.data.audit.rows import Rows
from preftune.data.audit.text import excerpt
from preftune.data.formats.base import BadRow, Row, common_prefix
from preftune.data.marks import MARKS
from preftune.data.options import DataOptions
from preftune.data.preference import enclosed
from preftune.data.tokenise import Encoder, TokenisedPair, sequences, tokenise_pairs
from preftune.data.truncation import TokenPair
from preftune.errors import PreftuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 500
_NUM_EXAMPLES = 3

#: Beginnings of turns in plain transcripts; in an answer they mean that it speaks for the other side too.
TURNS = ("\n\nHuman:", "\n\nAssistant:", "\nUser:", "\n### Instruction:", "\n### Human:")


@dataclass
class Tokenised:
    """Rows as token ids before truncation.

    Attributes:
        pairs: Token ids; a single answer stands on both sides.
        numbers: Position of each among the rows.
        failed: Position -> what the chat template said.
        merged: Position -> end of the tokenised prompt that the sequence does not contain, and what stands there.
        doubled: Positions of sequences that begin with two beginning-of-sequence tokens.
        no_end: Positions of answers without the end-of-sequence token.
        num_unknown: Unknown tokens.
        num_tokens: All tokens.
    """

    pairs: list[TokenPair] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    merged: dict[int, dict[str, Any]] = field(default_factory=dict)
    doubled: set[int] = field(default_factory=set)
    no_end: set[int] = field(default_factory=set)
    num_unknown: int = 0
    num_tokens: int = 0


def tokenise(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
) -> Tokenised:
    """Token ids of all rows, made the way training makes them, and what was noticed on the way.

    Args:
        rows: The rows.
        tokenizer: Tokenizer of the model.
        options: Data options.
        progress: Draws a bar.

    Returns:
        The tokens.

    Raises:
        ModelError: The tokenizer has no chat template or no end-of-sequence token.
    """
    encoder = Encoder(tokenizer, options.chat_template, keeps_lost=True)
    out = Tokenised()
    for start in progress(range(0, len(rows), _BATCH), "tokens"):
        part = rows.rows[start : start + _BATCH]
        results = (
            tokenise_pairs(encoder, part, options.append_eos, enclosed=options.enclose)
            if rows.paired
            else _single(encoder, part, options)
        )
        for i, row, result in zip(range(start, start + len(part)), part, results, strict=True):
            lost = encoder.lost.pop(id(row), None)
            if lost is not None:
                out.lost[i] = lost.what
            if isinstance(result, BadRow):
                out.failed[i] = result.what
            else:
                _enter(out, i, row, result, encoder, options)
    return out


def _single(encoder: Encoder, rows: Sequence[Row], options: DataOptions) -> list[TokenisedPair | BadRow]:
    """Single answers: prompt and completion, whole conversations, or plain text, which has no prompt."""
    out: list[TokenisedPair | BadRow] = []
    for row in rows:
        if "completion" in row:
            parts = sequences(encoder, [row], ("completion",))[0]
        elif "messages" in row:
            ids = encoder.conversations([row["messages"]], [row], generation_prompt=False)[0]
            parts = ids if isinstance(ids, BadRow) else [[], ids]
        else:
            parts = [[], encoder.encode([encoder.with_eos(row["text"])], special=True)[0]]
        if isinstance(parts, BadRow):
            out.append(parts)
            continue
        plain = isinstance(row.get("prompt", row.get("text")), str)
        prompt, whole = (encoder.drop_doubled_bos(ids) for ids in parts) if plain else parts
        start = common_prefix(prompt, whole) if prompt else 0
        answer = whole[start:]
        missing = not encoder.ends_with_eos(answer)
        answer = encoder.append_eos(answer) if missing and options.append_eos and not plain else answer
        doubled = plain and len(whole) < len(parts[1])
        out.append(TokenisedPair(TokenPair(whole[:start], answer, answer), prompt[start:], doubled, missing))
    return out


def _enter(out: Tokenised, i: int, row: Row, result: TokenisedPair, encoder: Encoder, options: DataOptions) -> None:
    tokenizer = encoder.tokenizer
    bos, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
    ids = enclosed(result.ids, tokenizer) if options.enclose else result.ids
    out.pairs.append(ids)
    out.numbers.append(i)
    # A template may write the token twice where nothing takes it away.
    if result.doubled_bos or (bos is not None and [*ids.prompt, *ids.chosen][:2] == [bos, bos]):
        out.doubled.add(i)
    if result.eos_missing:
        out.no_end.add(i)
    if result.merged:
        out.merged[i] = {
            "prompt_alone_ends": _shown(tokenizer, result.merged),
            "training_sees": _shown(tokenizer, ids.chosen[: len(result.merged) + 1]),
        }
    everything = (ids.prompt, ids.chosen, ids.rejected)
    out.num_tokens += sum(map(len, everything))
    if unknown is not None and unknown != tokenizer.eos_token_id:
        out.num_unknown += sum(part.count(unknown) for part in everything)


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    return [excerpt(str(token)) for token in tokenizer.convert_ids_to_tokens(list(ids))]


def _marked(
    rows: Rows, found: Tokenised, check: str, marked: Iterable[int], bad: Severity, words: str, fine: str, remedy: str
) -> Finding:
    hits = set(marked)
    share = share_of([i in hits for i in found.numbers], [rows.prompts[i] for i in found.numbers])
    more = found.merged if check == "boundary_merges" else {}
    examples = [{"row": rows.numbers[i], **more.get(i, {})} for i in sorted(hits)[:_NUM_EXAMPLES]]
    return Finding(
        check,
        bad if share.count else "ok",
        f"{share.count:,} rows ({share}) {words}" if share.count else fine,
        remedy if share.count else "Nothing to do.",
        **share.fields(),
        examples=tuple(examples),
        source="counted on the tokens that training uses",
    )


def check_tokens(rows: Rows, found: Tokenised, options: DataOptions) -> list[Finding]:
    """Boundary, beginning and end of the token sequences."""
    finding = partial(_marked, rows, found)
    groups = [rows.prompts[i] for i in found.numbers]
    merged = share_of([i in found.merged for i in found.numbers], groups)
    appended = options.append_eos and not isinstance(rows.rows[0].get("prompt", ""), str) if len(rows) else False
    out = [
        finding(
            "boundary_merges",
            found.merged,
            "warn" if merged.share > 0.01 else "note",
            "are tokenised differently with and without the answer",
            "prompts end on a token boundary",
            "Tokens merge over the end of the prompt, or the template renders it differently alone; the completion"
            " starts where the two part. End prompts on a boundary, or use a template that renders both alike.",
        ),
        finding(
            "doubled_bos",
            found.doubled,
            "warn",
            "begin with two beginning-of-sequence tokens",
            "no sequence begins with two beginning-of-sequence tokens",
            "Text or template writes the token that the tokenizer adds too; in plain text the second one is removed"
            " in training. Take it out of the data or the template, so that other tools see the same.",
        ),
        finding(
            "missing_eos",
            found.no_end,
            "note" if appended or options.enclose else "warn",
            "have an answer without the end-of-sequence token"
            + (", which is appended in training" if appended or options.enclose else ""),
            "every answer ends with the end-of-sequence token, and the loss falls on it",
            "The model does not learn to stop where the token is missing. Use a template that writes it, or"
            " append_eos: true.",
        ),
    ]
    if found.failed:
        share = share_of([i in found.failed for i in range(len(rows))])
        shown = tuple({"row": rows.numbers[i], "error": what} for i, what in found.failed.items())
        out.append(
            Finding(
                "template_errors",
                "problem",
                f"the chat template fails on {share.count:,} rows ({share})",
                "Training stops at them, or leaves them out with on_bad_rows: skip. Correct the turns or the template.",
                **share.fields(),
                examples=shown[:_NUM_EXAMPLES],
                source="counted",
            )
        )
    if found.lost:
        out.append(_lost(rows, found))
    if found.num_unknown:
        out.append(_unknown(found))
    return out


def _lost(rows: Rows, found: Tokenised) -> Finding:
    share = share_of([i in found.lost for i in range(len(rows))])
    return Finding(
        "text_lost",
        "problem",
        f"the chat template leaves out text of {share.count:,} rows ({share})",
        "Training leaves such rows out, or stops at them. Use a template that writes every role, or take the turn out.",
        **share.fields(),
        examples=tuple({"row": rows.numbers[i], "error": what} for i, what in found.lost.items())[:_NUM_EXAMPLES],
        source="every turn's text was looked for in what the template rendered",
    )


def _unknown(found: Tokenised) -> Finding:
    share = found.num_unknown / max(1, found.num_tokens)
    return Finding(
        "unknown_tokens",
        "warn" if share > 0.001 else "note",
        f"{found.num_unknown:,} tokens ({share:.2%}) are unknown to the tokenizer",
        "The model cannot see what they stand for: does this tokenizer belong to the language of the data?",
        count=found.num_unknown,
        share=share,
        source="heuristic: 'warn' from one token in a thousand on",
        threshold_kind="heuristic",
    )


def tokenised_or_reason(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
) -> tuple[Tokenised | None, str]:
    """Tokens, or why there are none: an audit goes on with what it can see."""
    try:
        return tokenise(rows, tokenizer, options, progress), ""
    except PreftuneError as error:
        return None, str(error)


def check_marks(rows: Rows, tokenizer: PreTrainedTokenizerBase | None) -> list[Finding]:
    """Special tokens written out in the text, and answers that go on with the other side's turn."""
    special = [str(token) for token in tokenizer.all_special_tokens] if tokenizer is not None else []
    # A row that a template has rendered already is full of them; one that is not should have none.
    marks = tuple(dict.fromkeys(mark for mark in (*special, *MARKS) if len(mark) > 2))
    eos = str(tokenizer.eos_token) if tokenizer is not None and tokenizer.eos_token else None
    out = []
    for check, looked_for, bad, words, remedy in (
        (
            "special_tokens_in_text",
            marks,
            "warn",
            "contain special tokens of a chat template as text",
            "They become real special tokens when the text is tokenised: rendered by another template before, or"
            " written by an attacker. Take them out, or give the rows as messages.",
        ),
        (
            "turns_in_answers",
            TURNS,
            "note",
            "have an answer that goes on with further turns",
            "The model is taught to speak for the other side too. Cut such answers at the first turn, unless whole"
            " dialogues are compared.",
        ),
    ):
        hits = {}
        for i, (prompt, answers) in enumerate(zip(rows.prompts, rows.answers, strict=True)):
            # An answer may end with the end-of-sequence token of its own accord.
            ends = [answer.rstrip().removesuffix(eos) if eos else answer for answer in answers]
            texts = ends if check == "turns_in_answers" else [prompt, *ends]
            mark = next((mark for mark in looked_for if any(mark in text for text in texts)), None)
            if mark is not None:
                hits[i] = mark.strip()
        share = share_of([i in hits for i in range(len(rows))], rows.prompts)
        severity: Severity = "ok" if not hits else "warn" if bad == "warn" else "note"
        out.append(
            Finding(
                check,
                severity,
                f"{share.count:,} rows ({share}) {words}" if hits else f"no rows {words}",
                remedy if hits else "Nothing to do.",
                **share.fields(),
                examples=tuple({"row": rows.numbers[i], "mark": mark} for i, mark in hits.items())[:_NUM_EXAMPLES],
                source=f"heuristic: looked for {', '.join(mark.strip() for mark in looked_for)}",
                threshold_kind="heuristic",
            )
        )
    return out
