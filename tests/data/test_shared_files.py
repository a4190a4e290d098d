"""Preference files as published, and conversations with tools: loaded, recognised, prepared, compared with TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from preftune.data import DataOptions, load, load_report, prepare, prepare_sft
from tests.data.conftest import TEMPLATES, make_tokenizer
from tests.data.test_pair_parity import our_sequences, scored, trl_sequences
from tests.own_rows import tool_conversations


def test_hh_transcripts(preference_files: Path, tokenizer: Any) -> None:
    train = load(str(preference_files / "hh_harmless_1700.jsonl.gz"), on_bad_rows="skip")["train"]
    report = load_report(train)
    assert report is not None
    assert set(report.formats.values()) == {"hh"}
    assert report.bad_rows == {"empty_completion": 4}
    assert len(train) == 1696
    assert all(row["prompt"].endswith("\n\nAssistant:") for row in train)
    dataset, prepared = prepare(
        train, tokenizer, DataOptions(max_length=None, on_bad_rows="skip", max_dropped_share=0.1)
    )
    assert len(dataset) == prepared.rows_kept == 1696
    assert prepared.rows_read == 1700
    assert prepared.merged_share == 0


def test_hh_as_trl_reads_it(preference_files: Path, tokenizer: Any) -> None:
    import gzip
    import json

    with gzip.open(preference_files / "hh_harmless_1700.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][80:230]
    options = DataOptions(max_length=300, on_bad_rows="warn")
    expected = [pair for pair in trl_sequences(rows, tokenizer, 300, "keep_start") if scored(pair)]
    assert our_sequences(rows, tokenizer, options) == expected


def test_dpo_en_is_sharegpt(preference_files: Path) -> None:
    tokenizer = make_tokenizer(template=TEMPLATES["marked"])
    train = load(str(preference_files / "dpo_en_demo.json"))["train"]
    report = load_report(train)
    assert report is not None
    assert set(report.formats.values()) == {"sharegpt_preference"}
    assert len(train) == 300
    rows = train.select(range(0, 300, 10)).to_list()
    for mode in ("keep_start", "keep_end"):
        options = DataOptions(max_length=900, truncation_mode=mode)
        expected = [pair for pair in trl_sequences(rows, tokenizer, 900, mode) if scored(pair)]
        assert our_sequences(rows, tokenizer, options) == expected
    examples, sft = prepare_sft(train, tokenizer, DataOptions(max_length=None))
    assert len(examples) == sft.rows_kept == 300


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_conversations_with_tools_as_trl_reads_them(mode: Any) -> None:
    template = (
        "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}{% for call in m['tool_calls'] or [] %}CALL {{ call['function'] | tojson }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template=template)
    rows = tool_conversations(12)
    expected = trl_sequences(rows, tokenizer, 700, mode)
    assert all(scored(pair) for pair in expected)
    assert our_sequences(rows, tokenizer, DataOptions(max_length=700, truncation_mode=mode)) == expected
    assert "CALL" in tokenizer.decode(expected[0][0][0]) or mode == "keep_end"
