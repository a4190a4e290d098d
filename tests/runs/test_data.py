"""One loader for training, audit, advice, sweeps and the page of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftune.errors import ConfigError, DataError
from preftune.runs.data import load_rows


def rows(word: str, number: int) -> list[dict[str, str]]:
    return [{"prompt": f"{word} {i} :", "chosen": " yes", "rejected": " no"} for i in range(number)]


def write(path: Path, content: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, content)), encoding="utf-8")


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """Settings that name a folder with three splits of different sizes."""
    for split, number in (("train", 6), ("test", 3), ("validation", 2)):
        write(tmp_path / "data" / f"{split}.jsonl", rows(split, number))
    return {
        "dataset_name": str(tmp_path / "data"),
        "dataset_train_split": "train",
        "dataset_test_split": "test",
        "implicit_prompt": "transcript",
    }


@pytest.mark.parametrize("with_test", [True, None])
def test_the_test_split_comes_along(values: dict[str, Any], with_test: bool | None) -> None:
    found = load_rows(values, with_test=with_test)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 6, "test": 3}


def test_it_is_left_where_nobody_asks(values: dict[str, Any]) -> None:
    assert set(load_rows(values, with_test=False)) == {"train"}


@pytest.mark.parametrize("with_test", [True, None])
def test_a_split_that_is_named_goes_before_the_usual_one(values: dict[str, Any], with_test: bool | None) -> None:
    values["dataset_test_split"] = "validation"
    assert len(load_rows(values, with_test=with_test, named_test=True)["test"]) == 2


@pytest.mark.parametrize("with_test", [True, None])
def test_a_split_that_is_named_has_to_be_there(values: dict[str, Any], with_test: bool | None) -> None:
    values["dataset_test_split"] = "nowhere"
    with pytest.raises(ConfigError, match="nowhere"):
        load_rows(values, with_test=with_test, named_test=True)


def test_a_run_that_evaluates_needs_a_test_split_and_an_audit_does_not(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", rows("a", 4))
    mixture = {"dataset_mixture": {"datasets": [{"id": str(tmp_path / "a.jsonl")}]}, "implicit_prompt": "transcript"}
    assert set(load_rows(mixture, with_test=None)) == {"train"}
    with pytest.raises(ConfigError, match="no test split"):
        load_rows(mixture, with_test=True)


def test_what_is_missing_has_its_default(values: dict[str, Any]) -> None:
    named = {**values, "dataset_config": None, "dataset_columns": None, "seed": 42, "pairing": "best_worst"}
    assert load_rows(values, with_test=False)["train"].to_list() == load_rows(named, with_test=False)["train"].to_list()


def test_a_column_of_text_gets_the_name_that_supervised_runs_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"story": "once", "other": "x"}])
    values = {"dataset_name": str(tmp_path / "a.jsonl"), "dataset_text_field": "story"}
    assert load_rows(values, with_test=False)["train"].to_list() == [{"text": "once"}]


def test_bad_rows_go_where_the_settings_say(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [*rows("a", 3), {"prompt": "p", "chosen": " same", "rejected": ""}])
    values = {
        "dataset_name": str(tmp_path / "a.jsonl"),
        "implicit_prompt": "transcript",
        "on_bad_rows": "skip",
        "quarantine_path": str(tmp_path / "bad.jsonl"),
    }
    load_rows(values, with_test=False)
    assert (tmp_path / "bad.jsonl").exists()


def test_no_data_is_one_line() -> None:
    with pytest.raises(DataError, match="no data"):
        load_rows({}, with_test=False)


@pytest.mark.parametrize("supervised", [True, False])
def test_a_supervised_run_reads_what_it_trains_on_where_a_pair_stands_beside_it(
    tmp_path: Path, supervised: bool
) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    row = {"messages": messages, "prompt": "p", "chosen": " c", "rejected": " r"}
    write(tmp_path / "a.jsonl", [row])  # type: ignore[list-item]
    values: dict[str, Any] = {"dataset_name": str(tmp_path / "a.jsonl")}
    found = load_rows(values if supervised else values | {"implicit_prompt": None}, with_test=False)["train"]
    assert ("messages" in found.column_names, "chosen" in found.column_names) == (supervised, not supervised)
