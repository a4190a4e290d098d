"""Rows put together at random: container x layout x template x form of content. Nothing is lost without a word.

The checker knows what was said and nothing of how it was stored: it looks for every sentence in the decoded tokens.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from preftune.data import DataOptions, load, prepare
from preftune.errors import PreftuneError
from tests.data.conftest import TEMPLATES, make_tokenizer
from tests.data.test_rendering import BLIND, DROPS, FAMILIES, PARTS_ONLY, TOOLS

ALL_TEMPLATES = {**TEMPLATES, **FAMILIES, **BLIND, **DROPS, "parts only": PARTS_ONLY, "tools": TOOLS}
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "saw",
    "that",
    "blue",
    "sky",
    "bright",
    "while",
    "dogs",
    "bark",
    "night",
]
WORDS += ["é", "日本", '"q"', "it's", "{x}", "[y]", "#1", "a: b", "\\n"]


def sentence(rng: random.Random, tag: str) -> str:
    """A sentence that no other turn contains."""
    return f"{' '.join(rng.choices(WORDS, k=rng.randint(1, 9)))} {tag}"


class Said:
    """What a row says, before it is stored: turns before the answers, and the two answers."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.system = sentence(rng, "S0") if rng.random() < 0.4 else ""
        self.turns = [sentence(rng, f"T{i}") for i in range(rng.choice([1, 1, 1, 3, 5]))]
        self.chosen = sentence(rng, "C0")
        self.rejected = sentence(rng, "R0")

    def prompt(self) -> list[dict[str, Any]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        roles = ("user", "assistant")
        return head + [{"role": roles[i % 2], "content": text} for i, text in enumerate(self.turns)]

    def pieces(self, side: str) -> list[str]:
        return [*([self.system] if self.system else []), *self.turns, getattr(self, side)]


def form(turn: dict[str, Any], kind: str, rng: random.Random) -> dict[str, Any]:
    """One turn as somebody else writes it."""
    role, text = turn["role"], turn["content"]
    if kind == "sharegpt":
        return {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text}
    if kind == "gpt roles":
        return {"role": {"user": "Human", "assistant": "gpt"}.get(role, role), "content": text}
    if kind == "parts":
        return {"role": role, "content": [{"type": "text", "text": text}]}
    if kind == "two parts":
        cut = rng.randrange(len(text))
        return {"role": role, "content": [{"type": "text", "text": one} for one in (text[:cut], text[cut:])]}
    if kind == "nulls":
        return {"role": role, "content": text, "tool_calls": None, "name": None}
    return turn


FORMS = ("plain", "sharegpt", "gpt roles", "parts", "two parts", "nulls")


def layout(said: Said, kind: str, content: str, rng: random.Random) -> dict[str, Any]:
    """A row in the layout of one project."""
    prompt = [form(turn, content, rng) for turn in said.prompt()]
    chosen, rejected = (
        [form({"role": "assistant", "content": text}, content, rng)] for text in (said.chosen, said.rejected)
    )
    history = [said.turns[i : i + 2] for i in range(0, len(said.turns) - 1, 2)]
    texts = {"chosen": said.chosen, "rejected": said.rejected}
    rest = {"system": said.system, "history": history}
    rows: dict[str, dict[str, Any]] = {
        "trl": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        "implicit": {"chosen": prompt + chosen, "rejected": prompt + rejected},
        "repeated": {"prompt": prompt, "chosen": prompt + chosen, "rejected": prompt + rejected},
        "conversations": {"conversations": prompt, "chosen": chosen[0], "rejected": rejected[0]},
        "axolotl": {"messages": prompt, "chosen": chosen[0], "rejected": rejected[0]},
        "swift": {"messages": prompt + chosen, "rejected_response": said.rejected},
        "swift messages": {"messages": prompt + chosen, "rejected_messages": prompt + rejected},
        "openai": {"input": {"messages": prompt}, "preferred_output": chosen, "non_preferred_output": rejected},
        "arena": {"conversation_a": prompt + rejected, "conversation_b": prompt + chosen, "winner": "model_b"},
        "alpaca": {"instruction": said.turns[-1], "input": "", **texts, **rest},
        "orca": {"question": said.turns[-1], **texts, **rest},
        "query": {"query": said.turns[-1], "response": said.chosen, "rejected_response": said.rejected, **rest},
        "system column": {"prompt": said.turns[-1], **texts, **rest},
        "system beside messages": {
            "system": said.system,
            "prompt": [form(turn, content, rng) for turn in said.prompt() if turn["role"] != "system"],
            "chosen": chosen,
            "rejected": rejected,
        },
        "mixed": {"prompt": prompt, **texts},
        "ranked": {"prompt": prompt, "responses": [said.rejected, said.chosen], "scores": [1, 2]},
    }
    return rows[kind]


LAYOUTS = (
    "trl",
    "implicit",
    "repeated",
    "conversations",
    "axolotl",
    "swift",
    "swift messages",
    "openai",
    "arena",
    "alpaca",
    "orca",
    "query",
    "system column",
    "system beside messages",
    "mixed",
    "ranked",
)
CONTAINERS = ("memory", "jsonl", "json", "data", "columns", "utf-16", "csv json", "csv repr", "parquet")


def stored(rows: list[dict[str, Any]], kind: str, folder: Path) -> Any:
    """The rows in a container, as what a user would pass."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if kind == "memory":
        return Dataset.from_list(rows)
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(str(folder / "a.parquet"))
        return str(folder / "a.parquet")
    if kind.startswith("csv"):
        dump = repr if kind == "csv repr" else json.dumps
        with open(folder / "a.csv", "w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, list(rows[0]))
            out.writeheader()
            out.writerows({k: v if isinstance(v, str) else dump(v) for k, v in row.items()} for row in rows)
        return str(folder / "a.csv")
    names = {"jsonl": "a.jsonl", "utf-16": "a.jsonl"}
    path = folder / names.get(kind, "a.json")
    if kind == "json":
        text = json.dumps(rows)
    elif kind == "data":
        text = json.dumps({"data": rows}, indent=1)
    elif kind == "columns":
        text = json.dumps({key: [row[key] for row in rows] for key in rows[0]})
    path.write_text(text, encoding="utf-16" if kind == "utf-16" else "utf-8")
    return str(path)


def squeezed(text: str) -> str:
    return "".join(text.split())


def silent_losses(said: list[Said], dataset: Dataset, tokenizer: Any) -> list[str]:
    """Sentences that are in no row that was kept, of rows that were kept."""
    out = []
    for one, ids in zip(said, dataset, strict=True):
        for side in ("chosen", "rejected"):
            text = squeezed(str(tokenizer.decode([*ids["prompt_ids"], *ids[f"{side}_ids"]])))
            # A template may write text as JSON.
            forms = [text, text.replace('\\"', '"')]
            out += [piece for piece in one.pieces(side) if not any(squeezed(piece) in t for t in forms)]
            if "[{'" in text or "'type':" in text or '"type":' in text or "None" in text:
                out.append(text)
    return out


def one_case(seed: int, folder: Path) -> str:
    """Put one file together, prepare it, and say what became of it."""
    rng = random.Random(seed)
    kind, content, container = rng.choice(LAYOUTS), rng.choice(FORMS), rng.choice(CONTAINERS)
    name = rng.choice(sorted(ALL_TEMPLATES))
    said = [Said(rng) for _ in range(3)]
    rows = [layout(one, kind, content, rng) for one in said]
    tokenizer = make_tokenizer(template=ALL_TEMPLATES[name])
    label = f"seed {seed}: {container} x {kind} x {name} x {content}"
    try:
        source = stored(rows, container, folder)
    except Exception:  # Arrow cannot hold such rows, or CSV such cells: nobody has such a file
        return "not stored"
    try:
        data = source if isinstance(source, Dataset) else load(source)["train"]
        dataset, report = prepare(data, tokenizer, DataOptions(max_length=None, on_bad_rows="error"))
    except PreftuneError as error:
        # Refused with a reason: by the template itself, or because it leaves a turn out.
        told = str(error)
        fair = "the chat template failed" in told or "the chat template leaves out what" in told
        assert fair, f"{label}: refused: {told}"
        assert name in DROPS or "failed" in told or name in ("gemma", "mistral", "phi3"), f"{label}: {told}"
        return "refused"
    assert len(dataset) == len(said), label
    lost = silent_losses(said, dataset, tokenizer)
    assert not lost, f"{label}: lost {lost[:2]}"
    assert report.rows_kept == len(said)
    return "kept"


@pytest.mark.thin(1)
@pytest.mark.parametrize("block", range(6))
def test_nothing_is_lost_without_a_word(block: int, tmp_path: Path) -> None:
    outcomes = []
    for seed in range(block * 30, block * 30 + 30):
        folder = tmp_path / str(seed)
        folder.mkdir()
        outcomes.append(one_case(seed, folder))
    assert outcomes.count("kept") > 15


def test_the_checker_sees_what_is_missing() -> None:
    """A checker that finds nothing in broken rows would find nothing anywhere."""
    rng = random.Random(0)
    said = [Said(rng)]
    tokenizer = make_tokenizer()
    row = layout(said[0], "trl", "plain", rng)
    whole, _ = prepare(Dataset.from_list([row]), tokenizer, DataOptions(max_length=None))
    assert not silent_losses(said, whole, tokenizer)
    for broken in (
        {"chosen": [{"role": "assistant", "content": "x"}]},
        {"prompt": [*row["prompt"][1:], {"role": "user", "content": "x"}]},
        {"rejected": [{"role": "assistant", "content": repr([{"type": "text", "text": said[0].rejected}])}]},
    ):
        ids, _ = prepare(Dataset.from_list([row | broken]), tokenizer, DataOptions(max_length=None))
        assert silent_losses(said, ids, tokenizer)
