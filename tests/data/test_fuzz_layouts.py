"""Containers, layouts, templates and forms of content combined: nothing crashes, and no text is lost without a word.

The checker knows nothing of formats: every row is made of words found nowhere else, and each of them has to be in what
the model is given, on the right side, or the row has to be refused.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from preftune.data import DataOptions, load, prepare, prepare_sft
from preftune.data.unpaired import prepare_unpaired
from preftune.errors import PreftuneError
from tests.data.conftest import make_tokenizer
from tests.data.test_rendering import FAMILIES

Put = Callable[[dict[str, Any]], Any]


class Words:
    """Words that stand nowhere else, by what they are for."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.said: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}

    def new(self, side: str) -> str:
        """A text of one or more such words, with what breaks careless code."""
        word = f"w{self.random.randrange(10**9)}z"
        self.said[side].append(word)
        return self.random.choice(
            [word, f"it's {word}", f'a "{word}" b', f"{word}\nand é", f"{{{word}}} [0]", f"ok, {word};"]
        )


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _split(item: dict[str, Any]) -> dict[str, Any]:
    half = len(item["content"]) // 2
    texts = (item["content"][:half], item["content"][half:])
    return item | {"content": [{"type": "text", "text": text} for text in texts]}


FORMS: dict[str, Put] = {
    "text": lambda item: item,
    "a part": lambda item: item | {"content": [{"type": "text", "text": item["content"]}]},
    "two parts": _split,
    "from and value": lambda item: {
        "from": {"user": "human", "assistant": "gpt"}.get(item["role"], item["role"]),
        "value": item["content"],
    },
}
STORED: dict[str, Callable[[Any], Any]] = {"as it is": lambda value: value, "JSON text": json.dumps, "printed": repr}


def before(words: Words, with_system: bool, turns: int) -> list[dict[str, Any]]:
    out = [turn("system", words.new("prompt"))] if with_system else []
    for _ in range(turns):
        out += [turn("user", words.new("prompt")), turn("assistant", words.new("prompt"))]
    return [*out, turn("user", words.new("prompt"))]


def rows_of(
    layout: str, words: Words, put: Put, store: Callable[[Any], Any], system: bool
) -> tuple[str, dict[str, Any]]:
    """What a layout is for, and one row of it."""
    chosen, rejected = turn("assistant", words.new("chosen")), turn("assistant", words.new("rejected"))
    talk = [put(one) for one in before(words, system, words.random.randrange(2))]
    good, bad = put(chosen), put(rejected)
    text = words.new("prompt")
    columns = {"system": words.new("prompt")} if system else {}
    plain = {"chosen": chosen["content"], "rejected": rejected["content"]}
    whole, other = store([*talk, good]), store([*talk, bad])
    answers = {"response_1": plain["chosen"], "response_2": plain["rejected"]}
    scores = {"responses": [plain["rejected"], plain["chosen"]], "scores": [1, 2]}
    named = {"preferred_output": [good], "non_preferred_output": [bad]}
    built: dict[str, tuple[str, dict[str, Any]]] = {
        "preference": ("pairs", {"prompt": store(talk), "chosen": store([good]), "rejected": store([bad])}),
        "whole conversations": ("pairs", {"chosen": whole, "rejected": other}),
        "sharegpt": ("pairs", {"conversations": store(talk), "chosen": good, "rejected": bad}),
        "axolotl": ("pairs", {"messages": store(talk), "chosen": good, "rejected": bad}),
        "ms-swift": ("pairs", {"messages": whole, "rejected_response": rejected["content"]}),
        "ms-swift messages": ("pairs", {"messages": whole, "rejected_messages": other}),
        "openai": ("pairs", {"input": {"messages": talk}, **named}),
        "votes": ("pairs", {"conversation_a": other, "conversation_b": whole, "winner": "model_b"}),
        "text": ("pairs", {"prompt": text, **plain, **columns}),
        "orca": ("pairs", {"question": text, **plain, **columns}),
        "alpaca": ("pairs", {"instruction": text, "input": words.new("prompt"), **plain, **columns}),
        "ranked": ("pairs", {"prompt": text, **scores, **columns}),
        "two answers": ("pairs", {"prompt": text, **answers, "preference": 1, **columns}),
        "messages": ("sft", {"messages": whole}),
        "conversations": ("sft", {"conversations": whole}),
        "instruction": ("sft", {"instruction": text, "output": plain["chosen"], **columns}),
        "dolly": ("sft", {"instruction": text, "context": words.new("prompt"), "response": plain["chosen"]}),
        "labelled": ("labelled", {"messages": whole, "label": True}),
        "kto_tag": ("labelled", {"instruction": text, "output": plain["chosen"], "kto_tag": "yes", **columns}),
    }  # fmt: skip
    use, row = built[layout]
    held = json.dumps(row, ensure_ascii=False) + json.dumps(row)
    for side, texts in words.said.items():
        # Words that were drawn for other layouts are not in this one.
        words.said[side] = [one for one in texts if one in held]
    return use, row


LAYOUTS = (
    *("preference", "whole conversations", "sharegpt", "axolotl", "ms-swift", "ms-swift messages", "openai", "votes"),
    *("text", "orca", "alpaca", "ranked", "two answers"),
    *("messages", "conversations", "instruction", "dolly", "labelled", "kto_tag"),
)
CONTAINERS = ("memory", ".jsonl", ".json", ".csv", ".parquet")


def contained(container: str, row: dict[str, Any], use: str, folder: Path) -> Any:
    """The row as a data set of two rows: from memory, or read from a file."""
    rows = [row, row]
    if container == "memory":
        return Dataset.from_list(rows, on_mixed_types="use_json")
    path = folder / f"rows{container}"
    if container == ".jsonl":
        path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    elif container == ".json":
        path.write_text(json.dumps({"data": rows}), encoding="utf-16")
    elif container == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            out = csv.DictWriter(file, list(row), delimiter=";")
            out.writeheader()
            for one in rows:
                out.writerow(one)
    return load(str(path), for_sft=use == "sft", pairing="none" if use == "labelled" else "best_worst")["train"]


def sides(use: str, dataset: Any, tokenizer: Any, options: DataOptions) -> dict[str, str]:
    """The text that the model is given, by side, as the trainer of a kind prepares it."""
    if use == "sft":
        whole = prepare_sft(dataset, tokenizer, options)[0][0]["input_ids"]
        return {"prompt": tokenizer.decode(whole), "chosen": tokenizer.decode(whole), "rejected": ""}
    row = (prepare if use == "pairs" else prepare_unpaired)(dataset, tokenizer, options)[0][0]
    names = ("prompt", "chosen", "rejected")
    found = {name: str(tokenizer.decode(row[f"{name}_ids"])) for name in names}
    return found if use == "pairs" else found | {"rejected": ""}


def faults(words: Words, found: dict[str, str], use: str) -> list[str]:
    """Texts that are missing, on the wrong side, or printed as Python or JSON prints a list."""
    out = []
    for side, texts in words.said.items():
        for word in texts if side != "rejected" or use == "pairs" else ():
            if word not in found[side]:
                out.append(f"{word} is not in the {side}")
    for word in words.said["rejected"]:
        out += [f"{word} is on the other side"] if word in found["chosen"] else []
    everything = "".join(found.values())
    marks = ("'role'", '"role"', "'content'", '"content"', "'type': 'text'", '"type": "text"', "None")
    return out + [f"{mark} is printed" for mark in marks if mark in everything]


def combinations() -> Iterator[tuple[str, str, str, str, bool]]:
    for layout, form, stored, container in itertools.product(LAYOUTS, FORMS, STORED, CONTAINERS):
        for system in (False, True):
            yield layout, form, stored, container, system


def run(template: str, chosen: list[tuple[str, str, str, str, bool]], folder: Path) -> None:
    tokenizer = make_tokenizer(template=FAMILIES[template])
    options = DataOptions(max_length=None, on_bad_rows="error")
    wrong = []
    for number, (layout, form, stored, container, system) in enumerate(chosen):
        words = Words(number)
        use, row = rows_of(layout, words, FORMS[form], STORED[stored], system)
        where = f"{layout}, {form}, {stored}, {container}, system: {system}"
        try:
            found = sides(use, contained(container, row, use, folder), tokenizer, options)
        except PreftuneError as error:
            # Gemma's template knows no system turn; Mistral's loses one in a conversation that goes on.
            if not system or template not in ("gemma", "mistral"):
                wrong.append(f"{where}: refused, {error}")
        except Exception as error:
            wrong.append(f"{where}: {type(error).__name__}: {error}")
        else:
            wrong += [f"{where}: {fault}" for fault in faults(words, found, use)]
    assert not wrong, f"{len(wrong)} of {len(chosen)}:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("template", FAMILIES)
def test_nothing_is_lost_in_some_combinations(template: str, tmp_path: Path) -> None:
    some = random.Random(f"{template}").sample(list(combinations()), 60)
    run(template, some, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("template", FAMILIES)
def test_nothing_is_lost_in_all_combinations(template: str, tmp_path: Path) -> None:
    """Every combination, dealt out twice among the templates."""
    shuffled = list(combinations())
    random.Random(0).shuffle(shuffled)
    run(template, shuffled[list(FAMILIES).index(template) % 3 :: 3], tmp_path)


def test_the_checker_finds_what_is_missing_and_what_is_printed() -> None:
    words = Words(0)
    words.said = {"prompt": ["w1z"], "chosen": ["w2z"], "rejected": ["w3z"]}
    good = {"prompt": "w1z", "chosen": "w2z", "rejected": "w3z"}
    assert faults(words, good, "pairs") == []
    assert faults(words, good | {"chosen": ""}, "pairs") == ["w2z is not in the chosen"]
    assert faults(words, good | {"chosen": "w2z w3z"}, "pairs") == ["w3z is on the other side"]
    assert faults(words, good | {"prompt": "[{'role': 'user'}] w1z"}, "pairs") == ["'role' is printed"]
