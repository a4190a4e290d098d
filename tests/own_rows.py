"""Preference data that the tests make themselves, in the shapes and lengths of two published files.

* ``hh_harmless_1700.jsonl.gz``: transcripts as in HH-RLHF, ``chosen`` and ``rejected`` alone, one to eighteen turns;
* ``dpo_en_demo.json``: ShareGPT conversations with ``conversations``, ``chosen`` and ``rejected``, prompts up to
  thousands of tokens, long answers with lists and code.

Numbers of turns, words per turn and the share of rows with characters outside ASCII follow the published files; every
word is invented. :func:`tool_conversations` has calls of tools besides.
"""

from __future__ import annotations

import gzip
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TRANSCRIPTS = "hh_harmless_1700.jsonl.gz"
CONVERSATIONS = "dpo_en_demo.json"
NUM_TRANSCRIPTS = 1700
NUM_CONVERSATIONS = 300
#: Transcripts whose answer is empty, and those whose answers differ in turns.
EMPTY, DIVERGING = (211, 640, 1003, 1499), (402, 1250)

_TEXT = "the a to I you and of is it that in do for what not be are how can have with on or my your would"
_COMMON = _TEXT.split()
_SYLLABLES = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "ing", "ous")]
#: Letters with marks, composed and combined, other scripts, wide characters, a family of four joined by zero width.
_UNICODE = (
    *("naïve", "cafe\u0301", "Größe", "пример", "例え話", "שלום", "مثال", "उदाहरण", "½", "10\u00a0km", "…", "—"),
    *("\U0001f642", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\u201cso\u201d", "it\u2019s"),
)


@cache
def _words() -> tuple[list[str], list[float]]:
    draw = random.Random(0)
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(500)]
    weights = [1 / (n + 2) for n in range(len(_COMMON) + len(words))]
    return _COMMON + words, weights


def _length(draw: random.Random, median: float, spread: float, least: int, most: int) -> int:
    return min(max(least, round(draw.lognormvariate(0.0, spread) * median)), most)


def text(draw: random.Random, num_words: int, *, unicode: bool = False) -> str:
    """Sentences of invented words, the common ones often; one word in twelve with characters outside ASCII."""
    words, weights = _words()
    found = draw.choices(words, weights, k=num_words)
    if unicode:
        for place in range(draw.randrange(min(12, num_words)), num_words, 12):
            found[place] = draw.choice(_UNICODE)
    left = 0
    for place in range(num_words):
        if left == 0:
            left = draw.randint(4, 16)
            found[place] = found[place][:1].upper() + found[place][1:]
            if place:
                found[place - 1] += draw.choice(".....?!")
        elif draw.random() < 0.08:
            found[place] = draw.choice((found[place] + ",", f"{draw.randint(1, 2000)}", "don't", f"({found[place]})"))
        left -= 1
    return " ".join(found) + draw.choice("...?")


def _answers(draw: random.Random, one: str, other: str) -> tuple[str, str]:
    """Two answers; some begin alike, some of these divide within a word."""
    kind = draw.random()
    if kind < 0.05:
        return f"{one.split()[0]} {one}", f"{one.split()[0]} {other}"
    if kind < 0.1 and len(one.split()[0]) > 2:
        return one, f"{one.split()[0][:-1]}{other[:1].lower()}{other[1:]}"
    return one, other


@cache
def transcripts() -> list[Row]:
    """Rows as in HH-RLHF: 1,700, four with an empty answer and two whose answers differ in turns."""
    draw = random.Random("transcripts-2")
    rows = []
    for number in range(NUM_TRANSCRIPTS):
        turns = 18 if number == 900 else draw.choices(range(1, 9), (496, 432, 424, 254, 55, 14, 11, 14))[0]

        def say(median: float, most: int, unicode: bool = draw.random() < 0.7) -> str:
            return text(draw, _length(draw, median, 0.9, 1, most), unicode=unicode)

        prompt = ""
        for turn in range(turns):
            prompt += f"\n\nHuman: {say(10, 110)}\n\nAssistant:" + (f" {say(22, 220)}" if turn + 1 < turns else "")
        chosen, rejected = (" " + answer for answer in _answers(draw, say(21, 204), say(27, 418)))
        if draw.random() < 0.03:
            chosen = chosen.replace(". ", ".\n\n", 1)
        if number in EMPTY:
            chosen = " "
        row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
        if number in DIVERGING:
            row["rejected"] = f"{prompt} {say(22, 220)}\n\nHuman: {say(10, 110)}\n\nAssistant:{rejected}"
        rows.append(row)
    return rows


def _long_text(draw: random.Random, num_words: int, *, unicode: bool) -> str:
    """Paragraphs, some with a list or a piece of code."""
    parts = []
    while num_words > 0:
        part = min(num_words, draw.randint(30, 90))
        num_words -= part
        said = text(draw, part, unicode=unicode)
        kind = draw.random()
        if kind < 0.2:
            said = "\n".join(f"{n}. {line}" for n, line in enumerate(said.split(". "), start=1))
        elif kind < 0.25:
            said = f"```python\ndef {_words()[0][draw.randrange(40, 500)]}(x):\n    return x[1:] + '\\t'\n```\n{said}"
        parts.append(said)
    return "\n\n".join(parts)


@cache
def conversations() -> list[Row]:
    """Rows as in ShareGPT's preference form: 300, some with a system turn, one of thirteen turns."""
    draw = random.Random("conversations")
    shapes = [
        (("human",), 114),
        (("system", "human"), 80),
        (("human", "gpt") * 2 + ("human",), 57),
        (("human", "gpt") * 3 + ("human",), 46),
        (("human", "gpt") * 6 + ("human",), 2),
    ]
    kinds = [kind for kind, count in shapes for _ in range(count)] + [("human", "gpt", "human")]
    draw.shuffle(kinds)
    # How many words the prompt and the two answers have: as in the file, a few of them very few.
    medians = {"human": 60, "system": 40, "gpt": 180}
    rows = []
    for kind in kinds:
        unicode = draw.random() < 0.2

        def say(median: float, spread: float, most: int, unicode: bool = unicode) -> str:
            return _long_text(draw, _length(draw, median, spread, 1, most), unicode=unicode)

        short = draw.random() < 0.05
        turns = [{"from": who, "value": say(6 if short else medians[who], 1.0, 900)} for who in kind]
        chosen, rejected = _answers(draw, *(say(9 if short else 230, 0.6, 715) for _ in range(2)))
        answers = {side: {"from": "gpt", "value": said} for side, said in (("chosen", chosen), ("rejected", rejected))}
        rows.append({"conversations": turns, **answers})
    return rows


def tool_conversations(number: int, seed: int = 0) -> list[Row]:
    """Pairs of conversations in which the model calls a tool, reads its result and answers."""
    draw = random.Random(f"tools-{seed}")
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What the weather will be.",
            "parameters": {"type": "object", "properties": properties, "required": ["city"]},
        },
    }
    rows = []
    for _ in range(number):
        call = {"name": "weather", "arguments": {"city": draw.choice(_UNICODE), "days": draw.randint(1, 9)}}
        turns = [
            {"role": "system", "content": text(draw, 12)},
            {"role": "user", "content": text(draw, draw.randint(3, 20), unicode=True)},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "name": "weather", "content": json.dumps({"degrees": draw.randint(-20, 40)})},
        ]
        answers = {
            side: [{"role": "assistant", "content": text(draw, draw.randint(2, 40), unicode=True)}]
            for side in ("chosen", "rejected")
        }
        rows.append({"prompt": turns, **answers, "tools": [tool]})
    return rows


def write_files(folder: Path) -> Path:
    """Write both files into a folder, and return it."""
    with gzip.open(folder / TRANSCRIPTS, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in transcripts())
    (folder / CONVERSATIONS).write_text(json.dumps(conversations(), ensure_ascii=False), encoding="utf-8")
    return folder
