"""A tiny model and real rows for the comparison with TRL, the independent oracle."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.models.tiny import save_tiny_model, train_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def hh_rows(folder: Path) -> list[dict[str, Any]]:
    """HH transcripts with the prompt split off at the last assistant turn, as TRL's users do it."""
    rows = []
    marker = "\n\nAssistant:"
    with gzip.open(folder / "hh_harmless_1700.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            end, other = (row[name].rindex(marker) + len(marker) for name in ("chosen", "rejected"))
            same = row["chosen"][:end] == row["rejected"][:other] and row["chosen"] != row["rejected"]
            if same and row["chosen"][end:].strip() and row["rejected"][other:].strip():
                rows.append(
                    {"prompt": row["chosen"][:end], "chosen": row["chosen"][end:], "rejected": row["rejected"][other:]}
                )
    return rows


def dpo_en_rows(folder: Path) -> list[dict[str, Any]]:
    """ShareGPT rows as conversations."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}

    def message(turn: dict[str, str]) -> dict[str, str]:
        return {"role": roles[turn["from"]], "content": turn["value"]}

    rows = json.loads((folder / "dpo_en_demo.json").read_text(encoding="utf-8"))
    return [
        {
            "prompt": [message(turn) for turn in row["conversations"]],
            "chosen": [message(row["chosen"])],
            "rejected": [message(row["rejected"])],
        }
        for row in rows
        if row["chosen"]["value"] != row["rejected"]["value"]
    ]


def _texts(rows: list[dict[str, Any]]) -> list[str]:
    return [
        part if isinstance(part, str) else " ".join(turn["content"] for turn in part)
        for row in rows
        for part in row.values()
    ]


class Setting:
    """Model folder, tokenizer and data of one file."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        torch.manual_seed(0)
        self.tokenizer = train_tokenizer(_texts(rows), 800)
        self.tokenizer.chat_template = CHAT_TEMPLATE
        self.path = save_tiny_model(folder, self.tokenizer)
        self.dataset = Dataset.from_list(rows)


@pytest.fixture(scope="session")
def settings(preference_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Setting]:
    """One setting per file of real preference data."""
    talks = [row for row in dpo_en_rows(preference_files) if len(_texts([row])[0]) < 600]
    # Whole accumulations up to the end of an epoch: in a partial one TRL averages means of unequal micro-batches.
    talks = talks[: len(talks) // 8 * 8]
    return {
        "hh": Setting(tmp_path_factory.mktemp("hh"), hh_rows(preference_files)[:240]),
        "dpo_en": Setting(tmp_path_factory.mktemp("dpo_en"), talks),
    }
