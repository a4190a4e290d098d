"""What preparation adds to TRL's: BOS, EOS, reports, formats, idempotence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from preftune.data import DataOptions, prepare
from tests.data.conftest import CHAT, PLAIN, TEMPLATES, make_tokenizer


def test_bos_is_never_doubled(bos_tokenizer: Any) -> None:
    rows = [PLAIN[0], {**PLAIN[0], "prompt": "<s>the cat"}]
    dataset, report = prepare(Dataset.from_list(rows), bos_tokenizer, DataOptions())
    assert dataset[0] == dataset[1]
    assert dataset[0]["prompt_ids"].count(bos_tokenizer.bos_token_id) == 1
    assert report.num_doubled_bos_fixed == 1
    assert any("two beginning-of-sequence tokens" in line for line in report.warnings)


def test_templates_that_write_bos_get_no_second() -> None:
    tokenizer = make_tokenizer(adds_bos=True, template=TEMPLATES["marked"])
    dataset, _ = prepare(Dataset.from_list(CHAT), tokenizer, DataOptions())
    assert all(row["prompt_ids"].count(tokenizer.bos_token_id) == 1 for row in dataset)


def test_eos_ends_every_plain_completion(tokenizer: Any) -> None:
    dataset, report = prepare(Dataset.from_list(PLAIN), tokenizer, DataOptions(max_length=None))
    for row in dataset:
        for column in ("chosen_ids", "rejected_ids"):
            assert row[column][-1] == tokenizer.eos_token_id
            assert row[column].count(tokenizer.eos_token_id) == 1
    assert report.num_eos_missing == 0


@pytest.mark.parametrize("template", TEMPLATES)
def test_eos_is_appended_to_conversations_on_request(template: str) -> None:
    tokenizer = make_tokenizer(template=TEMPLATES[template])
    plain, before = prepare(Dataset.from_list(CHAT), tokenizer, DataOptions())
    fixed, after = prepare(Dataset.from_list(CHAT), tokenizer, DataOptions(append_eos=True))
    missing = template in ("chatml", "merging")
    assert before.num_eos_missing == after.num_eos_missing == (len(CHAT) if missing else 0)
    assert (before.num_eos_appended, after.num_eos_appended) == (0, len(CHAT) if missing else 0)
    for one, other in zip(plain, fixed, strict=True):
        assert other["prompt_ids"] == one["prompt_ids"]
        for column in ("chosen_ids", "rejected_ids"):
            assert other[column] == one[column] + [tokenizer.eos_token_id] * missing


def test_merged_boundary_is_reported_with_its_example(tokenizer: Any) -> None:
    rows = [PLAIN[0], {"prompt": "the cat ", "chosen": "sat", "rejected": "saw"}]
    _, report = prepare(Dataset.from_list(rows), tokenizer, DataOptions())
    assert report.merged_share == 0.5
    assert report.merged_example == " "
    assert any("50.0% of the rows" in line and "' '" in line for line in report.warnings)


def test_report_counts(tokenizer: Any) -> None:
    rows = [{**PLAIN[0], "margin": 2.0}, {**PLAIN[1], "margin": None}, PLAIN[6]]
    dataset, report = prepare(Dataset.from_list(rows), tokenizer, DataOptions(max_length=20))
    assert dataset.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "rejected_prompt_ids", "margin"]
    assert dataset["margin"][:] == [2.0, None]
    assert report.num_prompt_tokens == sum(len(ids) for ids in dataset["prompt_ids"])
    assert report.num_chosen_tokens == sum(len(ids) for ids in dataset["chosen_ids"])
    assert report.num_rejected_tokens == sum(len(ids) for ids in dataset["rejected_ids"])
    assert report.lengths["prompt"]["max"] == max(len(ids) for ids in dataset["prompt_ids"])
    assert report.lengths["chosen"]["mean"] == report.num_chosen_tokens / 2
    assert json.loads(json.dumps(report.to_json()))["dropped"] == {"prompt_fills_max_length": 1}
    assert report.lines()[0] == "train: 2 of 3 rows (preference)"


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_prepared_pairs_pass_through(tokenizer: Any, mode: Any) -> None:
    options = DataOptions(max_length=14, truncation_mode=mode)
    first, _ = prepare(Dataset.from_list([{**row, "weight": 0.5} for row in PLAIN]), tokenizer, options)
    second, report = prepare(first, tokenizer, options)
    assert second[:] == first[:]
    assert second.features == first.features
    assert (report.format, report.num_truncated) == ("tokenised", 0)
    shorter, report = prepare(first, tokenizer, DataOptions(max_length=6, truncation_mode=mode))
    direct, _ = prepare(
        Dataset.from_list([{**row, "weight": 0.5} for row in PLAIN]),
        tokenizer,
        DataOptions(max_length=6, truncation_mode=mode),
    )
    assert shorter[:] == direct[:]
    assert report.num_truncated > 0


def test_implicit_prompt_rules(tokenizer: Any) -> None:
    talk = "\n\nHuman: the cat\n\nAssistant:"
    rows = Dataset.from_list([{"chosen": f"{talk} dogs bark", "rejected": f"{talk} dogs sat"}])
    trl, report = prepare(rows, tokenizer, DataOptions())
    assert report.format == "implicit_preference"
    assert tokenizer.decode(trl[0]["chosen_ids"]) == " bark</s>"
    ours, report = prepare(rows, tokenizer, DataOptions(implicit_prompt="transcript"))
    assert report.format == "hh"
    assert tokenizer.decode(ours[0]["prompt_ids"]) == talk
    assert tokenizer.decode(ours[0]["chosen_ids"]) == " dogs bark</s>"


def test_raw_rows_of_other_formats(tokenizer: Any) -> None:
    ranked = Dataset.from_list([{"prompt": "the cat", "responses": [" sat", " no"], "scores": [1.0, 4.0]}])
    dataset, report = prepare(ranked, tokenizer, DataOptions())
    assert (report.format, report.rows_read, report.rows_kept) == ("ranked", 1, 1)
    assert tokenizer.decode(dataset[0]["chosen_ids"]) == " no</s>"
    assert dataset[0]["margin"] == 3.0
    labelled = Dataset.from_list(
        [{"prompt": "the cat", "completion": text, "label": label} for text, label in ((" sat", False), (" no", True))]
        + [{"prompt": "dogs", "completion": " bark", "label": True}]
    )
    dataset, report = prepare(labelled, tokenizer, DataOptions())
    assert tokenizer.decode(dataset[0]["rejected_ids"]) == " sat</s>"
    assert any("1 of 3 labelled answers have no counterpart" in line for line in report.warnings)


def test_streamed_rows_are_read_ahead(tokenizer: Any) -> None:
    stream = IterableDataset.from_generator(lambda: iter(PLAIN[:2]))
    dataset, report = prepare(stream, tokenizer, DataOptions())
    assert len(dataset) == 2
    assert any("2 rows of the stream were read ahead" in line for line in report.warnings)
