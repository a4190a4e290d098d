"""A tiny model and generated pairs of uneven lengths."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny import save_tiny_model, train_tokenizer

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "runs",
    "sleeps",
    "over",
    "under",
    "big",
    "small",
    "red",
    "blue",
    "house",
    "tree",
    "river",
]


def make_rows(num: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs whose prompts and answers have from one to sixty words."""
    rng = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    return [{"prompt": text(40), "chosen": " " + text(60), "rejected": " " + text(30)} for _ in range(num)]


@dataclass
class World:
    """Model folder, data file and tokenizer."""

    model: str
    file: str
    rows: list[dict[str, str]]
    tokenizer: Any


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Everything a run needs, made on the spot."""
    folder = tmp_path_factory.mktemp("world")
    rows = make_rows(40)
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], 300)
    model = save_tiny_model(folder / "model", tokenizer)
    file: Path = folder / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return World(model, str(file), rows, tokenizer)
