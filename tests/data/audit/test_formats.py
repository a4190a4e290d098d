"""All kinds of rows: implicit prompts, conversations, labelled answers, SFT, token ids; and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.data import DataOptions, load, prepare
from preftune.data.audit import audit
from preftune.data.audit.report import SEVERITIES
from preftune.errors import DataError, SetupError
from tests.data.audit.conftest import Look, clean_rows
from tests.data.conftest import make_tokenizer

PAIRS_ONLY = {"contradictions", "circles", "near_contradictions", "length_bias", "layout_bias", "label_noise"}


def test_implicit_prompts_and_transcripts(look: Look) -> None:
    rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in clean_rows(30)]
    report = look(rows)
    assert (report.kind, report.format, report.num_rows) == ("preference", "implicit_preference", 30)
    talks = [
        {side: f"\n\nHuman: {row['prompt']}\n\nAssistant:{row[side]}" for side in ("chosen", "rejected")}
        for row in clean_rows(30)
    ]
    read = look(talks, options=DataOptions(implicit_prompt="transcript"))
    assert read.format == "hh"
    finding = read.finding("turns_in_answers")
    assert finding is not None
    assert finding.count == 0


def test_conversations_read_like_their_text(look: Look) -> None:
    rows = clean_rows(30)
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]
    plain, talk = look(rows), look(chats)
    assert [(one.check, one.count) for one in plain.findings] == [(one.check, one.count) for one in talk.findings]


def test_labelled_answers(look: Look) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in clean_rows(30)
        for side in ("chosen", "rejected")
    ]
    report = look(rows, make_tokenizer())
    assert report.kind == "unpaired"
    assert set(report.not_applicable) >= PAIRS_ONLY
    assert "single answers" in report.not_applicable["label_noise"]
    labels = report.finding("label_contradictions")
    assert labels is not None
    assert labels.severity == "ok"
    planted = look([*rows, {**rows[0], "label": False}]).finding("label_contradictions")
    assert planted is not None
    assert (planted.count, planted.severity) == (2, "warn")


@pytest.mark.parametrize("form", ["completion", "messages", "text"])
def test_sft_data(look: Look, form: str) -> None:
    rows: list[dict[str, Any]] = []
    for row in clean_rows(20):
        if form == "completion":
            rows.append({"prompt": row["prompt"], "completion": row["chosen"]})
        elif form == "messages":
            turns = [("user", row["prompt"]), ("assistant", row["chosen"])]
            rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
        else:
            rows.append({"text": row["prompt"] + row["chosen"]})
    report = look([*rows, rows[0]], make_tokenizer())
    assert report.kind == "sft"
    assert set(report.not_applicable) >= PAIRS_ONLY
    copies = report.finding("duplicate_rows")
    assert copies is not None
    assert copies.count == 1
    assert report.lengths["unit"] == "tokens"
    assert report.lengths["sequence"]["max"] > 0


def test_token_ids_are_written_out(look: Look) -> None:
    tokenizer = make_tokenizer(template=None)
    rows = clean_rows(20)
    prepared, _ = prepare(load_rows(rows), tokenizer, DataOptions(max_length=None))
    report = look(prepared, tokenizer)
    assert report.num_rows == 20
    assert report.num_prompts == 20
    with pytest.raises(DataError, match="token ids"):
        look(prepared)


def load_rows(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def test_the_same_seed_gives_the_same_report(look: Look) -> None:
    rows = clean_rows(80)
    first, second = look(rows, seed=3).to_json(), look(rows, seed=3).to_json()
    assert first | {"seconds": 0} == second | {"seconds": 0}


def test_the_file_has_what_its_readers_expect(look: Look, tmp_path: Path) -> None:
    report = look(clean_rows(80), make_tokenizer(), name="some set")
    document = json.loads(report.write(tmp_path / "new").read_text(encoding="utf-8"))
    assert {"dataset", "num_rows", "findings", "lengths", "noise", "seconds"} <= set(document)
    assert document["dataset"] == "some set"
    for finding in document["findings"]:
        assert {"check", "severity", "title", "detail", "count", "share", "low", "high", "examples", "source"} <= set(
            finding
        )
        assert finding["severity"] in SEVERITIES
        assert finding["source"]
        assert finding["threshold_kind"] in ("published", "heuristic", "none")
    assert {"estimate", "low", "high", "judge", "agreement", "caveat"} <= set(document["noise"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["audit.json"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(SetupError, match="cannot write"):
        report.write(blocked)


def test_margins_have_to_match_the_rows(look: Look) -> None:
    with pytest.raises(DataError, match="one reference margin per usable row"):
        look(clean_rows(10), ref_margins=[0.5] * 9)


def test_a_missing_library_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from preftune.data.audit.optional_libraries import optional

    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(SetupError, match="pip install datasketch"):
        optional("datasketch", "datasketch")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=15)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=6))
def test_any_text_gives_a_report(triples: list[tuple[str, str, str]]) -> None:
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in triples]
    report = audit(rows, show_progress=False)
    document = report.to_json()
    json.dumps(document, allow_nan=False)
    assert report.num_rows == sum(bool(c.strip()) and bool(r.strip()) and c != r for _, c, r in triples)
    for finding in report.findings:
        if finding.share is not None:
            assert finding.low is not None
            assert finding.high is not None
            assert 0 <= finding.low <= finding.share <= finding.high <= 1


@pytest.mark.slow
def test_both_real_files(look: Look, preference_files: Path) -> None:
    hh = look(load(str(preference_files / "hh_harmless_1700.jsonl.gz"), on_bad_rows="skip")["train"])
    assert (hh.num_rows, hh.num_read, hh.format) == (1696, 1700, "hh")
    empty = hh.finding("empty_answers")
    assert empty is not None
    assert empty.count == 4
    talks = look(load(str(preference_files / "dpo_en_demo.json"))["train"])
    assert (talks.num_rows, talks.format) == (300, "sharegpt_preference")
