"""Two answers and a verdict: arena votes, SHP, HelpSteer's preferences, PKU-SafeRLHF, WebGPT comparisons."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import (
    BELOW_USES,
    OPENING_USES,
    TEMPLATE_USES,
    BadRow,
    FormatSpec,
    Message,
    Row,
    need,
    need_number,
    need_score,
    template_extras,
)
from preftune.data.formats.openings import answer, asked, opened, prompted, question, shared_turns
from preftune.data.formats.turns import is_messages, need_messages, need_text_or_messages, parsed
from preftune.errors import DataError

QUESTIONS = (
    *("prompt", "question", "instruction", "query", "input", "problem", "user_prompt", "input_text", "context"),
    "history",
)
#: Names of the two answers, the first one's first.
ANSWERS = (
    *((f"{word}{a}", f"{word}{b}")
      for word in ("response", "answer", "completion", "output", "summary", "candidate", "option", "conversation",
                   "conv", "messages")
      for a, b in (("_a", "_b"), ("_A", "_B"), ("_0", "_1"), ("_1", "_2"), ("1", "2"), ("A", "B"))),
    ("human_ref_A", "human_ref_B"),
    ("A", "B"),
)  # fmt: skip
#: Columns that name the better answer.
WINNERS = (
    *("winner", "preferred", "preference", "choice", "better_response_id", "better_response", "labels", "label"),
    *("overall_response", "safer_response_id"),
)
#: Of these, names that other things have as well: what they say counts less than a strength or scores.
_UNSURE = ("labels", "label")
#: Columns whose sign does: below 0 the first answer is better.
STRENGTHS = ("overall_preference", "preference_strength")
#: Columns of one score per answer.
SCORES = tuple(
    (f"{word}{a}", f"{word}{b}")
    for word in ("score", "rating")
    for a, b in (("_0", "_1"), ("_a", "_b"), ("_A", "_B"), ("_1", "_2"))
)
#: What the names of whole conversations begin with.
_WHOLE = ("conv", "messages")
#: Columns of one mark per outcome, as in exports of votes.
VOTES = ("winner_model_a", "winner_model_b", "winner_tie")
_FIRST = {"model_a", "a", "first", "left", "chosen_a"}
_SECOND = {"model_b", "b", "second", "right", "chosen_b"}
_TIES = ("both", "bothbad", "bothgood", "neither", "none", "equal", "same", "draw", "tie", "tied", "ties")
#: The name of an answer, and what tells it from the other.
_ANSWER = re.compile(
    r"(?:response|answer|completion|output|summary|candidate|option|conversation|conv|messages|model|assistant)"
    r"[ _-]?([ab]|\d)"
)


def answers_of(columns: Collection[str]) -> tuple[str, str] | None:
    """The columns of the two answers."""
    return next((pair for pair in ANSWERS if pair[0] in columns and pair[1] in columns), None)


def _has_verdict(columns: Collection[str]) -> bool:
    names = (*WINNERS, *STRENGTHS, VOTES[0])
    return any(name in columns for name in names) or any(a in columns and b in columns for a, b in SCORES)


def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """Two answers beside something that says which is better."""
    pair = answers_of(columns)
    if pair is None or not _has_verdict(columns):
        return False
    return pair[0].startswith(_WHOLE) or any(name in columns for name in QUESTIONS)


def convert(row: Mapping[str, Any]) -> Row:
    """The better answer is chosen. A tie says nothing about which to prefer, so that the row is left out."""
    first, second = pair = answers_of(row) or ("response_a", "response_b")
    gap = _verdict(row, pair)
    if not gap:
        raise BadRow("no_preference", "verdict", "a tie: neither answer is preferred", remedy="set on_bad_rows: skip")
    better, worse = (first, second) if gap > 0 else (second, first)
    if first.startswith(_WHOLE):
        prompt, chosen, rejected = _divided(row, better, worse)
    else:
        prompt, chosen, rejected = _asked(row, better, worse)
    return {"prompt": opened(_system(row), prompt), "chosen": chosen, "rejected": rejected, **template_extras(row)}


def _system(row: Mapping[str, Any]) -> Mapping[str, Any]:
    # SHP's history is the question.
    return row if _question(row) != "history" else {key: value for key, value in row.items() if key != "history"}


def _question(row: Mapping[str, Any]) -> str:
    return next((name for name in QUESTIONS if name in row), "prompt")


def _divided(row: Mapping[str, Any], better: str, worse: str) -> tuple[list[Message], list[Message], list[Message]]:
    chosen, rejected = (_judged(need_messages(row, name), row.get("turn")) for name in (better, worse))
    shared = shared_turns(chosen, rejected)
    if not shared:
        raise BadRow(
            "no_shared_prompt", worse, "the two conversations do not begin with the same turn", remedy="remove the row"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _judged(turns: list[Message], number: Any) -> list[Message]:
    """A conversation up to the answer that the vote is about, where the row has its number, as MT-bench's rows do."""
    ends = [place for place, turn in enumerate(turns, 1) if turn["role"] == "assistant"]
    told = str(number).strip().removesuffix(".0")
    one = told.isdigit() and 0 < int(told) <= len(ends)
    return turns[: ends[int(told) - 1]] if one else turns


def _asked(row: Mapping[str, Any], better: str, worse: str) -> tuple[list[Message], list[Message], list[Message]]:
    name = _question(row)
    given = need(row, name)
    if isinstance(given, Mapping) and isinstance(given.get("full_text"), str):
        given = given["full_text"]
    several = [parsed(row[one]) if isinstance(row.get(one), str) else row.get(one) for one in (better, worse)]
    turns = parsed(given) if isinstance(given, str) and given.lstrip().startswith("[") else given
    lists = all(isinstance(one, list) and not is_messages(one) for one in several)
    if isinstance(turns, list) and turns and not is_messages(turns) and (lists or not isinstance(given, str)):
        return _exchanges(turns, several, better, worse)
    prompt = asked(question({**row, name: given}, name))
    answers = [answer(need_text_or_messages(row, each)) for each in (better, worse)]
    found: tuple[list[Message], list[Message], list[Message]] = prompted({}, prompt, *answers)
    return found


def _exchanges(
    questions: list[Any], answers: list[Any], better: str, worse: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Several turns, stored as a list of questions and two lists of answers; the first question alone is shared."""
    out = []
    for name, texts in zip((better, worse), answers, strict=True):
        if not isinstance(texts, list) or len(texts) != len(questions):
            raise BadRow("malformed_response", name, f"{name!r} must list one answer per question", value=texts)
        turns: list[Message] = []
        for asked_for, said in zip(questions, texts, strict=True):
            if not isinstance(asked_for, str) or not isinstance(said, str):
                raise BadRow("null", name, f"a turn of {name!r} holds no text", value=said, remedy="remove the row")
            turns += [{"role": "user", "content": asked_for}, {"role": "assistant", "content": said}]
        out.append(turns)
    return out[0][:1], out[0][1:], out[1][1:]


def _verdict(row: Mapping[str, Any], pair: tuple[str, str]) -> float:
    """Above 0 where the first answer is better, below 0 where the second is, 0 for a tie."""
    if row.get(VOTES[0]) is not None:
        return _vote(row, VOTES[0]) - _vote(row, VOTES[1])
    unreadable: BadRow | None = None
    told: tuple[str, float] | None = None
    # A named winner counts before a strength, which has a sign only where nothing else says whose it is.
    for name in WINNERS:
        if told is None and row.get(name) is not None:
            try:
                told = name, named(row, name, pair)
            except BadRow as bad:
                unreadable = unreadable or bad
    # Somebody looked at the row, and did not decide.
    if unreadable is not None and unreadable.field not in _UNSURE and (told is None or told[0] in _UNSURE):
        raise unreadable
    if told is not None and told[0] not in _UNSURE:
        return told[1]
    numbers = _by_numbers(row)
    if told is not None and numbers is not None and told[1] * numbers[1] < 0:
        raise BadRow(
            "verdicts_disagree",
            told[0],
            f"{told[0]!r} and {numbers[0]!r} name different answers as the better one",
            value={name: row[name] for name in (told[0], numbers[0])},
            remedy="leave out the column that is no verdict (`dataset_columns` names those to read)",
        )
    found = told or numbers
    if found is None:
        raise unreadable or BadRow("null", "winner", "nothing says which answer is better", remedy="remove the row")
    return found[1]


def _by_numbers(row: Mapping[str, Any]) -> tuple[str, float] | None:
    """What a signed strength, or else two scores, say, with the column."""
    for name in STRENGTHS:
        if row.get(name) is not None:
            strength = need_number(row[name], name)
            if abs(strength) > 3:
                what = f"{name!r} says how much better an answer is, and not which"
                raise BadRow("not_a_label", name, what, value=strength, remedy="add a column `winner`: a, b or tie")
            return name, -strength
    for a, b in SCORES:
        if row.get(a) is not None and row.get(b) is not None:
            return a, need_score(row[a], a) - need_score(row[b], b)
    return None


def _vote(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or str(value).strip().lower() in ("true", "false"):
        value = str(value).strip().lower() == "true"
    return need_number(int(value) if isinstance(value, bool) else value or 0, name)


def named(row: Mapping[str, Any], field: str, pair: tuple[str, str]) -> float:
    """Which of two answers a column names: 1 for the first, -1 for the second, 0 for a tie.

    Raises:
        BadRow: It names neither.
        DataError: It counts from 0 where the names count from 1, so that there are two readings.
    """
    value = row[field]
    word = str(value).strip().lower()
    names = [name.lower() for name in pair]
    models = [str(row.get(name)).strip().lower() for name in ("model_a", "model_b")]
    for two in (names, models):
        if word in two and two[0] != two[1]:
            return 1.0 if word == two[0] else -1.0
    if word in _FIRST | _SECOND:
        return 1.0 if word in _FIRST else -1.0
    if re.split(r"[^a-z]+", word)[0] in _TIES:
        return 0.0
    ends = [name[-1].lower() for name in pair]
    spelled = _ANSWER.fullmatch(word)
    if spelled is not None:
        # Letters and numbers from 1 tell first and second; where the names count from 0, so does what names them.
        orders = (ends, ["a", "b"], ["1", "2"])
        order = next((each for each in orders if spelled[1] in each), None)
        if order is not None and not (ends[0] == "0" and order == ["1", "2"]):
            return 1.0 if spelled[1] == order[0] else -1.0
    # SHP says 1 where A is better; elsewhere the number is that of the answer, as it is in the columns' names.
    if pair[0] == "human_ref_A" and word in ("0", "1", "0.0", "1.0"):
        return 1.0 if float(word) else -1.0
    number = word.removesuffix(".0")
    if number in ends:
        return 1.0 if number == ends[0] else -1.0
    if ends == ["1", "2"] and number == "0":
        if field == "preference":
            # AlpacaEval's draw.
            return 0.0
        # Rows that say 1 would mean the other answer, so that leaving this one out would not do.
        raise DataError(
            f"{field!r} counts the answers from 0, and their names from 1",
            where=f"field {field!r}",
            value=value,
            remedy=f"if so, set dataset_columns: {{{pair[0]}: response_0, {pair[1]}: response_1}}; if 0 is a tie, "
            "leave these rows out",
        )
    between = _between(word, ends) if field == "preference" else None
    if between is not None:
        return between
    raise BadRow(
        "not_a_label",
        field,
        f"{field!r} names neither answer",
        value=value,
        remedy="write model_a, model_b or tie, or set on_bad_rows: skip",
    )


def _between(word: str, ends: list[str]) -> float | None:
    """A judge's mean vote between the two numbers of the answers, such as AlpacaEval's 1.97: the nearer one wins."""
    try:
        first, second, vote = float(ends[0]), float(ends[1]), float(word)
    except ValueError:
        return None
    return (first + second) / 2 - vote if first <= vote <= second else None


TWO_ANSWERS = FormatSpec(
    name="two_answers",
    kind="preference",
    required=(),
    detect=detect,
    convert=convert,
    summary="two answers (response_a/response_b, response_0/response_1, conversation_a/conversation_b, ...) and which"
    " is better (winner, preference_strength, labels, scores); ties are left out",
    uses={
        **OPENING_USES,
        **TEMPLATE_USES,
        **dict.fromkeys(("model_a", "model_b"), "which answer a winner of that name gave"),
        **dict.fromkeys(QUESTIONS, "the prompt"),
        **dict.fromkeys((name for pair in ANSWERS for name in pair), "one of the two answers"),
        **dict.fromkeys((*WINNERS, *STRENGTHS, *VOTES), "which answer is better"),
        **dict.fromkeys((name for pair in SCORES for name in pair), "which answer is better, if nothing else says it"),
        "turn": "which answer of a conversation the vote is about",
        **BELOW_USES,
    },
    either=(tuple(name for name in QUESTIONS if name not in BELOW_USES and name != "history"),),
)
