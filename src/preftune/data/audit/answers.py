"""What the answers say, as far as counting can tell: bad rows, refusals, languages, trivial answers, layout."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from preftune.data.audit.optional_libraries import optional
from preftune.data.audit.proportions import Share, share_of
from preftune.data.audit.report import Finding, Severity
from preftune.data.audit.rows import Rows
from preftune.data.audit.text import excerpt, same_text, words
from preftune.data.formats import NOT_USED
from preftune.data.rows import NEUTRAL
from preftune.terminal.units import plural

NUM_EXAMPLES = 5
#: An answer counts as a refusal where one of these stands in its first 200 characters, in lower case.
REFUSALS = (
    "i can't help",
    "i cannot help",
    "i can't assist",
    "i cannot assist",
    "i can't provide",
    "i cannot provide",
    "i can't answer",
    "i cannot answer",
    "i can't do that",
    "i cannot do that",
    "i won't help",
    "i won't do that",
    "i will not help",
    "i'm not able to",
    "i am not able to",
    "i'm unable to",
    "i am unable to",
    "i'm not comfortable",
    "i am not comfortable",
    "i don't feel comfortable",
    "i'm sorry, but i can",
    "i am sorry, but i can",
    "i'm sorry, i can",
    "sorry, but i can",
    "as an ai language model",
    "against my programming",
    "i must decline",
    "i have to decline",
    "i'd rather not",
)
_REFUSAL_START = 200
#: Answers that carry nothing, whatever the question; compared in lower case without signs.
_TRIVIAL = frozenset({"ok", "okay", "n a", "na", "none", "null", "nan", "todo", "test", "...", "i don't know"})
_LAYOUT = {
    "lists": re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE),
    "bold or headings": re.compile(r"\*\*\S|^#{1,6}\s", re.MULTILINE),
    "code blocks": re.compile(r"```"),
    "emoji": re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]"),
}
_LANGUAGE_ROWS, _LANGUAGE_LETTERS, _LANGUAGE_SURE = 1000, 40, 0.7
#: Bad rows that are a finding of their own.
_EMPTY, _IDENTICAL = "empty_completion", "identical_pair"


def check_bad_rows(rows: Rows, max_dropped_share: float | None) -> list[Finding]:
    """Rows that training cannot use: identical answers, empty answers, and all others by reason."""
    counts = Counter(one["reason"] for one in rows.bad)
    out = []
    if rows.paired:
        out.append(_bad(rows, "identical_pairs", [_IDENTICAL], "have the same chosen and rejected answer"))
    out.append(_bad(rows, "empty_answers", [_EMPTY], "have an empty answer"))
    others = [reason for reason in counts if reason not in (_IDENTICAL, _EMPTY, *NEUTRAL)]
    told = ", ".join(f"{counts[reason]:,} {reason}" for reason in others)
    found = _bad(rows, "bad_rows", others, f"cannot be used ({told})" if told else "cannot be used")
    lost = sum(count for reason, count in counts.items() if reason not in NEUTRAL) / max(1, rows.num_read)
    if max_dropped_share is not None and lost > max_dropped_share:
        told = f"All together {lost:.1%} of the rows are lost, and training refuses more than {max_dropped_share:.0%}."
        found = replace(found, severity="problem", detail=f"{found.detail} {told}")
    return [*out, found]


def _bad(rows: Rows, check: str, reasons: list[str], what: str) -> Finding:
    places = [one for one in rows.bad if one["reason"] in reasons]
    found = share_of([True] * len(places) + [False] * max(0, rows.num_read - len(places)))
    severity: Severity = "ok" if not places else "warn" if found.share < 0.05 else "problem"
    return Finding(
        check,
        severity,
        f"{plural(found.count, 'row')} of {rows.num_read:,} {what}",
        "With on_bad_rows: skip, which is the command line's default, training leaves them out as this audit does; with"
        " on_bad_rows: error it stops at the first."
        if places
        else "There are none.",
        **found.fields(),
        examples=tuple(dict(one) for one in places[:NUM_EXAMPLES]),
        source="counted; heuristic: 'problem' from 5 % on",
        threshold_kind="heuristic",
    )


def is_refusal(answer: str) -> bool:
    """Whether one of :data:`REFUSALS` stands at the beginning of an answer."""
    start = answer[:_REFUSAL_START].lower().replace("\u2019", "'")
    return any(phrase in start for phrase in REFUSALS)


def check_refusals(rows: Rows) -> Finding:
    """How often an answer declines, chosen against rejected."""
    sides = [[is_refusal(text) for text in column] for column in zip(*rows.answers, strict=True)]
    shares = [share_of(side, rows.prompts) for side in sides]
    if rows.paired:
        title = f"refusals: {shares[0]} of chosen, {shares[1]} of rejected answers"
        gap = shares[0].low > shares[1].high or shares[1].low > shares[0].high
        more = "chosen" if shares[0].share > shares[1].share else "rejected"
        detail = (
            f"{more.capitalize()} answers refuse more often: the model learns to refuse"
            f" {'more' if more == 'chosen' else 'less'}. Is that what the data are for?"
            if gap
            else "The two sides refuse about equally often."
        )
        severity: Severity = "note" if gap else "ok"
    else:
        title, detail = f"refusals: {shares[0]} of answers", "Counted by their first words."
        severity = "note" if shares[0].low > 0.1 else "ok"
    examples = [
        {"row": rows.numbers[i], "answer": excerpt(rows.answers[i][0])} for i, hit in enumerate(sides[0]) if hit
    ]
    return Finding(
        "refusals",
        severity,
        title,
        detail,
        **shares[0].fields(),
        examples=tuple(examples[:NUM_EXAMPLES]),
        source=f"heuristic: one of {len(REFUSALS)} English phrases in the first {_REFUSAL_START} characters; 'note'"
        + (" where the intervals do not overlap" if rows.paired else " where the interval lies above 10 %"),
        threshold_kind="heuristic",
    )


def check_trivial(rows: Rows) -> list[Finding]:
    """Answers without content, and one answer to many prompts."""
    flags = [any(_is_trivial(text) for text in answers) for answers in rows.answers]
    found = share_of(flags, rows.prompts)
    out = [
        Finding(
            "trivial_answers",
            "ok" if not found.count else "note" if found.share < 0.02 else "warn",
            f"{found.count:,} rows ({found}) have an answer without content",
            "A word like 'ok' or 'N/A', or signs alone: little can be learned from them."
            if found.count
            else "Every answer has words in it.",
            **found.fields(),
            examples=tuple(
                {"row": rows.numbers[i], "answers": [excerpt(text) for text in rows.answers[i]]}
                for i, flag in enumerate(flags)
                if flag
            )[:NUM_EXAMPLES],
            source="heuristic: no word, or one of a short list; 'warn' from 2 % on",
            threshold_kind="heuristic",
        )
    ]
    if rows.paired and len({same_text(prompt) for prompt in rows.prompts}) > 1:
        out.append(_stock_answers(rows))
    return out


def _is_trivial(text: str) -> bool:
    found = words(text)
    return " ".join(found) in _TRIVIAL or not any(c.isalnum() for c in text)


def _stock_answers(rows: Rows) -> Finding:
    """The same answer under different prompts, always on one side: the model learns the sentence, not the task."""
    sides: dict[str, Counter[str]] = {"chosen": Counter(), "rejected": Counter()}
    for side, texts in (("chosen", rows.chosen), ("rejected", rows.rejected)):
        for prompt, text in {(same_text(p), same_text(t)) for p, t in zip(rows.prompts, texts, strict=True)}:
            if prompt:
                sides[side][text] += 1
    top = [(n, side, text) for side, counts in sides.items() for text, n in counts.most_common(3) if n > 1]
    top.sort(key=lambda item: -item[0])
    most = top[0][0] if top else 0
    found = share_of([True] * most + [False] * max(0, len(rows) - most))
    severity: Severity = "warn" if found.low > 0.02 else "note" if most >= max(5, 0.005 * len(rows)) else "ok"
    return Finding(
        "stock_answers",
        severity,
        f"the most frequent answer stands under {plural(max(most, 1), 'prompt')}"
        + (f" ({found}), as {top[0][1]}" if top else ""),
        "One sentence that is always right or always wrong is learned first and teaches little else."
        if severity != "ok"
        else "No answer is repeated often enough to matter.",
        **found.fields(),
        examples=tuple({"side": side, "prompts": n, "answer": excerpt(text)} for n, side, text in top[:NUM_EXAMPLES]),
        source="heuristic: 'note' from 5 prompts and 0.5 % on, 'warn' where the interval lies above 2 %",
        threshold_kind="heuristic",
    )


def check_layout(rows: Rows) -> list[Finding]:
    """Lists, headings, code and emoji: how often the answer that has them wins over one without."""
    out = []
    for name, pattern in _LAYOUT.items():
        wins, groups = [], []
        for prompt, (chosen, rejected) in zip(rows.prompts, rows.answers, strict=True):
            has = bool(pattern.search(chosen)), bool(pattern.search(rejected))
            if has[0] != has[1]:
                wins.append(has[0])
                groups.append(prompt)
        found = share_of(wins, groups)
        biased = found.total > 0 and (found.low > 0.6 or found.high < 0.4)
        out.append((name, found, biased))
    told = [f"{name} {found} of {found.total:,}" for name, found, _ in out if found.total]
    biased_ones = [name for name, _, biased in out if biased]
    strongest: Share = max((found for _, found, _ in out if found.total), key=_distance, default=share_of([]))
    return [
        Finding(
            "layout_bias",
            "note" if biased_ones else "ok",
            "the answer with it wins over the one without: " + "; ".join(told) if told else "layout differs in no pair",
            f"The label goes with layout ({', '.join(biased_ones)}): expect more or less of it in generations."
            if biased_ones
            else "No layout decides the label beyond chance.",
            **strongest.fields(),
            source="heuristic: 'note' where the interval lies above 60 % or below 40 %",
            threshold_kind="heuristic",
        )
    ]


def _distance(share: Share) -> float:
    return max(share.low - 0.5, 0.5 - share.high)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    """The model is unpacked once; that takes longer than asking it about a thousand texts."""
    module = optional("py3langid.langid", "py3langid")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)


def check_languages(rows: Rows, seed: int) -> Finding:
    """Languages of a random part of the rows, and answers in another language than their prompt."""
    identifier = _identifier()

    def language(text: str) -> str | None:
        if sum(map(str.isalpha, text)) < _LANGUAGE_LETTERS:
            return None
        name, probability = identifier.classify(text[:2000])
        return str(name) if probability >= _LANGUAGE_SURE else None

    picks = np.sort(np.random.default_rng(seed).permutation(len(rows))[:_LANGUAGE_ROWS])
    counts: Counter[str] = Counter()
    mixed, compared = {}, []
    for i in map(int, picks):
        asked = language(rows.prompts[i])
        said = [language(text) for text in rows.answers[i]]
        counts.update(name for name in said if name)
        if asked and any(said):
            compared.append(i)
            if any(name and name != asked for name in said):
                mixed[i] = {"prompt": asked, "answers": said}
    total = sum(counts.values())
    found = share_of([i in mixed for i in compared], [rows.prompts[i] for i in compared])
    told = ", ".join(f"{name} {n / total:.1%}" for name, n in counts.most_common(5)) or "none recognised"
    severity: Severity = "warn" if found.total and found.low > 0.02 else "note" if found.count else "ok"
    return Finding(
        "languages",
        severity,
        f"languages of answers: {told}"
        + (f"; {found.count:,} of {found.total:,} rows answer in another language than the prompt's" if mixed else ""),
        "Answers in another language than the prompt teach to switch; look at them unless the task is translation."
        if mixed
        else "Answers are in the language of their prompt, as far as short texts tell.",
        **found.fields(),
        examples=tuple({"row": rows.numbers[i], **what} for i, what in mixed.items())[:NUM_EXAMPLES],
        source=f"heuristic: py3langid on up to {_LANGUAGE_ROWS:,} random rows, texts of {_LANGUAGE_LETTERS} letters and"
        f" more, probability of {_LANGUAGE_SURE} and more; 'warn' where the interval lies above 2 %",
        threshold_kind="heuristic",
    )


def first_rows(rows: Rows) -> list[Finding]:
    """What the first rows show about how they are read; a run over the same data says the same."""
    if not rows.findings:
        return []
    said = " ".join(f"{finding[0].upper()}{finding[1:]}." for finding in rows.findings)
    return [Finding("first_rows", "warn", "the rows may not be read as they are meant", said)]


def check_columns(rows: Rows) -> Finding:
    """What is done with every column of the data."""
    unused = [name for name, use in rows.columns.items() if use == NOT_USED]
    used = [f"{name}: {use}" for name, use in rows.columns.items() if use != NOT_USED]
    return Finding(
        "columns",
        "note" if unused else "ok",
        f"columns that are not used: {', '.join(unused)}" if unused else "every column is used",
        "; ".join(used),
        count=len(unused),
        source="the table of formats",
    )
