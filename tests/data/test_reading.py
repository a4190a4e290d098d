"""Which columns are read, and what becomes of those that nothing reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from preftune.data import DataOptions, load, load_report, prepare, prepare_sft
from preftune.data.formats import detect
from preftune.errors import ConfigError, DataError
from tests.data.conftest import assistant, user
from tests.data.test_sft_parity import trl_labels

TALK = [user("the cat"), assistant("sat")]
PAIR = {"prompt": "the cat", "chosen": " sat", "rejected": " saw"}
HH = {
    "chosen": "\n\nHuman: the cat\n\nAssistant: the mat is",
    "rejected": "\n\nHuman: the cat\n\nAssistant: the dogs",
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "the cat", "input": "", "output": "sat", "text": "the cat sat"},
        {"prompt": "the cat", "completion": " sat", "label": True},
        {"prompt": "the cat", "completion": " sat", "chosen": "x", "rejected": "y"},
    ],
    ids=["alpaca with text", "labelled", "completion beside a pair"],
)
def test_sft_reads_what_trl_reads(tokenizer: Any, tmp_path: Path, row: dict[str, Any]) -> None:
    ours, _ = prepare_sft(Dataset.from_list([row]), tokenizer, DataOptions(max_length=None))
    assert [(one["input_ids"], one["loss_mask"]) for one in ours] == trl_labels([row], tokenizer)
    loaded = load(write(tmp_path / "a.jsonl", [row]), for_sft=True, pairing="none")["train"]
    again, _ = prepare_sft(loaded, tokenizer, DataOptions(max_length=None))
    assert again.to_list() == ours.to_list()


def test_a_conversation_beside_a_pair_is_what_sft_reads(tokenizer: Any) -> None:
    row = {"messages": TALK, "chosen": "sat", "rejected": "saw"}
    ours, report = prepare_sft(Dataset.from_list([row]), tokenizer, DataOptions(max_length=None))
    expected = trl_labels([{"messages": TALK}], tokenizer)
    assert [(one["input_ids"], one["loss_mask"]) for one in ours] == expected
    assert report.format == "messages"


def test_text_beside_the_fields_it_was_made_of_is_said(tokenizer: Any) -> None:
    rows = [{"instruction": "the cat", "output": "sat", "text": "the cat sat"}]
    _, report = prepare_sft(Dataset.from_list(rows), tokenizer, DataOptions())
    assert any("dataset_format: alpaca" in line for line in report.warnings)
    _, report = prepare_sft(Dataset.from_list(rows), tokenizer, DataOptions(dataset_format="alpaca"))
    assert report.format == "alpaca"


def test_a_question_beside_conversations_is_not_the_prompt() -> None:
    row = {"question": "q", "chosen": TALK, "rejected": [TALK[0], assistant("saw")]}
    spec = detect(list(row), row)
    assert spec is not None
    assert spec.name == "implicit_preference"


@pytest.mark.parametrize("rule", ["transcript", "common_prefix"])
def test_the_rule_for_missing_prompts_holds_from_the_first_look(tmp_path: Path, rule: Any) -> None:
    row = load(write(tmp_path / "a.jsonl", [HH]), implicit_prompt=rule)["train"][0]
    end = "Assistant:" if rule == "transcript" else "Assistant: the"
    assert row["prompt"] == "\n\nHuman: the cat\n\n" + end


def test_named_text_field(tokenizer: Any) -> None:
    rows = [{"text": "title", "body": "the cat sat"}]
    ours, _ = prepare_sft(Dataset.from_list(rows), tokenizer, DataOptions(), dataset_text_field="body")
    expected = trl_labels(rows, tokenizer, dataset_text_field="body")
    assert [(one["input_ids"], one["loss_mask"]) for one in ours] == expected
    with pytest.raises(ConfigError, match=r"dataset_text_field: no such column; got 'content'; allowed: text, body"):
        prepare_sft(Dataset.from_list(rows), tokenizer, DataOptions(), dataset_text_field="content")


def test_images_are_never_dropped_in_silence(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**PAIR, "images": ["x.png"]}]
    file, data = write(tmp_path / "a.jsonl", rows), Dataset.from_list(rows)
    says = r"vision-language data are not supported; got \['images'\]"
    with pytest.raises(DataError, match=says):
        load(file)
    with pytest.raises(DataError, match=says):
        prepare(data.to_iterable_dataset(), tokenizer, DataOptions())
    with pytest.raises(DataError, match=says):
        prepare_sft(data, tokenizer, DataOptions())
    assert load(file, columns=list(PAIR))["train"].to_list() == [PAIR]


def test_numbers_that_nothing_reads_stop_nothing(tokenizer: Any) -> None:
    prepare_sft(Dataset.from_list([{"text": "the cat sat", "weight": "12 kg"}]), tokenizer, DataOptions())
    rows = [{**PAIR, "score_chosen": float("nan"), "score_rejected": 1.0}, {**PAIR, "score_chosen": 3.0}]
    pairs, _ = prepare(Dataset.from_list(rows), tokenizer, DataOptions())
    assert "margin" not in pairs.column_names
    pairs, _ = prepare(Dataset.from_list([{**PAIR, "margin": "large"}]), tokenizer, DataOptions())
    assert "margin" not in pairs.column_names
    with pytest.raises(DataError, match="'weight' is not a finite number; got 'heavy'"):
        prepare(Dataset.from_list([{**PAIR, "weight": "heavy"}]), tokenizer, DataOptions())


def test_a_missing_weight_is_one(tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [{**PAIR, "weight": None}, {**PAIR, "weight": 0.0}, {**PAIR, "weight": 2.5}]
    pairs, _ = prepare(Dataset.from_list(rows), tokenizer, DataOptions())
    assert pairs["weight"][:] == [1.0, 0.0, 2.5]
    pairs, _ = prepare(Dataset.from_list([{**row, "weight": None} for row in rows]), tokenizer, DataOptions())
    assert "weight" not in pairs.column_names


def test_tools_that_are_no_list_are_a_bad_row(tokenizer: Any, tmp_path: Path) -> None:
    chat = {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [assistant("saw")]}
    file = write(tmp_path / "a.jsonl", [chat, {**chat, "tools": "hammer"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2, field 'tools': 'tools' is not a list of tools; got 'hammer'"):
        load(file)
    assert len(load(file, on_bad_rows="skip")["train"]) == 1
    with pytest.raises(DataError, match=r"row 0 .*field 'tools'"):
        prepare(Dataset.from_list([{**chat, "tools": "{}"}]), tokenizer, DataOptions())


# ---- token ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"prompt": "p", "completion": "c"}])
@pytest.mark.parametrize("only", [None, False, True])
def test_a_completion_mask_counts_as_in_trl(tokenizer: Any, extra: dict[str, str], only: bool | None) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1], **extra}]
    ours, _ = prepare_sft(Dataset.from_list(rows), tokenizer, DataOptions(), completion_only_loss=only)
    expected = trl_labels(rows, tokenizer, completion_only_loss=only)
    assert [(one["input_ids"], one["loss_mask"]) for one in ours] == expected


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": [5, 6, 7], "labels": [5, 9, 9]}, r"field 'labels': the label at position 1 .*\(6\); got 9"),
        ({"input_ids": [5, 6, 7], "labels": [5, 6]}, r"field 'labels': 2 entries for 3 tokens"),
        ({"input_ids": [5, 6, 7], "loss_mask": [1]}, r"field 'loss_mask': 1 entries for 3 tokens"),
        ({"input_ids": None}, r"field 'input_ids': no list of numbers; got None"),
    ],
)
def test_token_ids_and_what_goes_with_them_are_checked(tokenizer: Any, row: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"input_ids": [5, 6, 7]}
    good |= {key: [5, 6, 7] if key == "labels" else [1, 1, 1] for key in list(row)[1:]}
    with pytest.raises(DataError, match=f"row 1 .*{says}"):
        prepare_sft(Dataset.from_list([good, row]), tokenizer, DataOptions())


# ---- splits ------------------------------------------------------------------------------------------------------


def splits_folder(tmp_path: Path) -> str:
    write(tmp_path / "train.jsonl", [{**PAIR, "chosen": f" {n}"} for n in range(10)])
    write(tmp_path / "test.jsonl", [{**PAIR, "chosen": f" {n}" if n < 5 else None} for n in range(10)])
    return str(tmp_path)


def test_a_test_split_that_nobody_asks_for_is_not_read(tmp_path: Path) -> None:
    folder = splits_folder(tmp_path)
    assert list(load(folder, with_test=False)) == ["train"]
    with pytest.raises(DataError, match=r"test\.jsonl:6"):
        load(folder)


def test_every_split_has_its_own_report(tmp_path: Path, tokenizer: Any) -> None:
    data = load(splits_folder(tmp_path), on_bad_rows="skip")
    reports = [load_report(data[name]) for name in ("train", "test")]
    assert [(r.rows_read, r.num_lost, r.bad_rows) for r in reports if r] == [(10, 0, {}), (10, 5, {"null": 5})]
    _, train = prepare(data["train"], tokenizer, DataOptions(on_bad_rows="skip", max_dropped_share=0.0))
    assert (train.rows_read, train.bad_rows) == (10, {})
    with pytest.raises(DataError, match=r"5 of 10 rows are lost \(50\.0%\): 5 null"):
        prepare(data["test"], tokenizer, DataOptions(on_bad_rows="skip", max_dropped_share=0.1))


def test_a_bad_row_that_stays_counts_once(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "a.jsonl", [PAIR, {**PAIR, "rejected": " sat"}])
    data = load(file, on_bad_rows="warn")["train"]
    _, report = prepare(data, tokenizer, DataOptions(on_bad_rows="warn"))
    assert report.bad_rows == {"identical_pair": 1}


def test_a_mixture_may_keep_its_order(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"{name}.jsonl", [{**PAIR, "chosen": f" {name}{n}"} for n in range(4)]) for name in "ab"]
    entries = [{"id": part} for part in parts]
    kept = load(dataset_mixture={"datasets": entries, "shuffle": False})["train"]["chosen"][:]
    assert kept == [f" {name}{n}" for name in "ab" for n in range(4)]
    shuffled = load(dataset_mixture={"datasets": entries})["train"]["chosen"][:]
    assert shuffled != kept
    assert sorted(shuffled) == sorted(kept)
