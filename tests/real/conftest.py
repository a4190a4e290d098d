"""A pretrained model and conversations for it."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from benchmarks import pretrained

_TOPICS = ["bread", "a long walk", "learning to swim", "old maps", "moving house", "a quiet evening", "the night train"]


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of SmolLM2-135M-Instruct."""
    return str(pretrained.folder_of("smollm2"))


def pair_rows(number: int) -> list[dict[str, Any]]:
    """Pairs of answers to a question, as conversations: friendly against curt, of many lengths."""
    rows = []
    for n in range(number):
        topic = _TOPICS[n % len(_TOPICS)]
        more = " Take your time with it, and ask somebody who has done it before." * (n % 4)
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"Question {n}: what should I know about {topic}?"}],
                "chosen": [{"role": "assistant", "content": f"Good that you ask about {topic}!{more} Start small."}],
                "rejected": [{"role": "assistant", "content": f"No idea about {topic}." + " Look it up." * (n % 3)}],
            }
        )
    return rows


@pytest.fixture(scope="session")
def pairs() -> Dataset:
    """Sixteen pairs."""
    return Dataset.from_list(pair_rows(16))
