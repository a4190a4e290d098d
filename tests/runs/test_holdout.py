"""Rows that are held out: whole prompts, the same ones again, and refused where that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from preftune.data import load_report
from preftune.errors import ConfigError, DataError
from preftune.runs.data import load_rows
from preftune.runs.holdout import hold_out, prompt_key


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pair(prompt: str, number: int) -> dict[str, str]:
    return {"prompt": prompt, "chosen": f" yes {number}", "rejected": f" no {number}"}


def rows(prompts: int, each: int = 1) -> list[dict[str, str]]:
    return [pair(f"question {n}", k) for k in range(each) for n in range(prompts)]


@pytest.mark.parametrize(("size", "prompts"), [(0.25, 5), (0.01, 1), (12, 4), (1, 1)])
def test_whole_prompts_are_held_out(size: float, prompts: int) -> None:
    """A share is one of the prompts; a number is one of rows, here three to a prompt."""
    parts = hold_out(Dataset.from_list(rows(20, each=3)), size, seed=7)
    test, train = set(parts["test"]["prompt"]), set(parts["train"]["prompt"])
    assert len(test) == prompts
    assert not test & train
    assert len(parts["test"]) + len(parts["train"]) == 60
    assert hold_out(Dataset.from_list(rows(20, each=3)), size, seed=7)["test"]["chosen"] == parts["test"]["chosen"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": "c"}),
        (
            {"chosen": [said("user", "a"), said("assistant", "b")], "rejected": [said("user", "a")]},
            {"chosen": [said("user", "a"), said("assistant", "c")], "rejected": [said("user", "a")]},
        ),
        (
            {"messages": [said("user", "a"), said("assistant", "b")]},
            {"messages": [said("user", "a"), said("assistant", "c"), said("user", "d")]},
        ),
    ],
)
def test_rows_of_one_prompt_have_one_key(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert prompt_key(one) == prompt_key(other)
    assert prompt_key(one) != prompt_key({"prompt": "z"})


@pytest.mark.parametrize("size", [0, 1.5, 8, -1, True])
def test_sizes_out_of_range_are_refused(size: float) -> None:
    with pytest.raises(ConfigError, match="test_split_size"):
        hold_out(Dataset.from_list(rows(8)), size, seed=0)


def test_one_prompt_cannot_be_divided() -> None:
    with pytest.raises(DataError, match="too few prompts"):
        hold_out(Dataset.from_list(rows(1, each=9)), 0.5, seed=0)


def test_the_loader_holds_out_and_counts_what_it_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(10))), encoding="utf-8")
    values = {"dataset_name": str(path), "test_split_size": 0.3, "seed": 1, "implicit_prompt": "transcript"}
    for with_test in (True, None, False):
        splits = load_rows(values, with_test=with_test)
        assert (len(splits["train"]), len(splits["test"])) == (7, 3)
        report = load_report(splits["train"])
        assert report is not None
        assert report.rows_read == 10


def test_a_split_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows(4))), encoding="utf-8")
    values = {"dataset_name": str(tmp_path), "test_split_size": 0.3, "dataset_test_split": "test"}
    with pytest.raises(ConfigError, match="a test split already"):
        load_rows(values, with_test=True, named_test=True)
