"""Bad rows of every kind under every policy, and what is said about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from preftune.data import DataOptions, load, prepare
from preftune.data.convert import convert_row
from preftune.data.formats import FORMATS
from preftune.data.rows import BadRowHandler
from preftune.errors import ConfigError, DataError, ModelError
from tests.data.conftest import CHAT, PLAIN, TEMPLATES, assistant, make_tokenizer, user

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
# What is wrong, the row, the reason, the field, whether TRL trains on it.
BAD: list[tuple[Any, str, str, bool]] = [
    ({**GOOD, "chosen": ""}, "empty_completion", "chosen", True),
    ({**GOOD, "rejected": " \n"}, "empty_completion", "rejected", True),
    ({**GOOD, "rejected": "c"}, "identical_pair", "rejected", True),
    ({**GOOD, "chosen": 7}, "not_text", "chosen", False),
    ({**GOOD, "chosen": "half \ud83d"}, "lone_surrogate", "chosen", False),
    ({**GOOD, "prompt": "byte \udce9"}, "invalid_utf8", "prompt", False),
    ({"prompt": "p", "chosen": "c"}, "missing_column", "rejected", False),
    ({**GOOD, "rejected": None}, "null", "rejected", False),
    ({**GOOD, "chosen": [assistant("c")]}, "mixed_types", "prompt", False),
    ({**GOOD, "weight": -1}, "negative_weight", "weight", False),
    ({**CHAT[0], "chosen": []}, "empty_messages", "chosen", False),
    ({**CHAT[0], "chosen": [assistant(" ")]}, "empty_completion", "chosen", True),
    ({**CHAT[0], "prompt": [{"role": "wizard", "content": "x"}]}, "unknown_role", "prompt", True),
    ({**CHAT[0], "prompt": [{"role": "user", "content": None}]}, "null", "prompt", False),
    ({**CHAT[0], "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "not_text", "prompt", False),
    (["not", "an", "object"], "not_a_mapping", "row", False),
]


@pytest.mark.parametrize(("row", "reason", "field", "trl_goes_on"), BAD)
def test_every_kind_under_every_policy(row: Any, reason: str, field: str, trl_goes_on: bool, tmp_path: Path) -> None:
    spec = FORMATS["preference"]
    with pytest.raises(DataError) as caught:
        convert_row(row, "a.jsonl:7", spec, BadRowHandler("error"))
    assert str(caught.value).startswith(f"a.jsonl:7, field {field!r}: ")
    assert caught.value.remedy

    skip = BadRowHandler("skip", str(tmp_path / "sub" / "quarantine.jsonl"))
    assert convert_row(row, "a.jsonl:7", spec, skip) == []
    assert skip.counts == {reason: 1}
    (line,) = (tmp_path / "sub" / "quarantine.jsonl").read_text(encoding="ascii").splitlines()
    entry = json.loads(line)
    assert (entry["place"], entry["reason"], entry["field"]) == ("a.jsonl:7", reason, field)
    assert entry["row"] == row

    warn = BadRowHandler("warn")
    if trl_goes_on:
        assert len(convert_row(row, "a.jsonl:7", spec, warn)) == 1
        assert warn.counts == {reason: 1}
    else:
        with pytest.raises(DataError):
            convert_row(row, "a.jsonl:7", spec, warn)


def test_text_parts_and_tool_calls_are_no_bad_rows() -> None:
    row = {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}],
        "rejected": [assistant("r")],
    }
    assert convert_row(row, "x", FORMATS["preference"], BadRowHandler("error")) == [row]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("a")]}, "no_assistant_turn"),
        ({"prompt": "p", "completion": ""}, "empty_completion"),
        ({"text": " "}, "empty_completion"),
    ],
)
def test_sft_rows(row: dict[str, Any], reason: str) -> None:
    name = {"messages": "messages", "prompt": "prompt_completion", "text": "text"}[next(iter(row))]
    handler = BadRowHandler("skip")
    assert convert_row(row, "x", FORMATS[name], handler) == []
    assert handler.counts == {reason: 1}


def test_prepare_names_the_row_and_counts_what_it_skips(tokenizer: Any, tmp_path: Path) -> None:
    rows = Dataset.from_list([PLAIN[0], {**GOOD, "chosen": ""}, PLAIN[1]])
    with pytest.raises(DataError, match=r"test data set, row 1 \(the first is 0\), field 'chosen': 'chosen' is empty"):
        prepare(rows, tokenizer, DataOptions(), "test")
    path = tmp_path / "quarantine.jsonl"
    dataset, report = prepare(rows, tokenizer, DataOptions(on_bad_rows="skip", quarantine_path=str(path)))
    assert len(dataset) == report.rows_kept == 2
    assert report.rows_read == 3
    assert report.bad_rows == {"empty_completion": 1}
    assert json.loads(path.read_text(encoding="ascii"))["row"]["prompt"] == "p"
    assert any(str(path) in line for line in report.warnings)


def test_a_failing_template_names_the_row(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{{ m['content'] }}{% if 'bark' in m['content'] %}{{ raise_exception('no dogs') }}"
    )
    template += "{% endif %}{% endfor %}"
    rows = Dataset.from_list([CHAT[0], CHAT[1]])
    with pytest.raises(DataError, match=r"row 1 .*the chat template failed: TemplateError: no dogs"):
        prepare(rows, tokenizer, DataOptions(chat_template=template, on_bad_rows="warn"))
    dataset, report = prepare(rows, tokenizer, DataOptions(chat_template=template, on_bad_rows="skip"))
    assert len(dataset) == 1
    assert report.bad_rows == {"template_error": 1}


def test_no_template_and_no_eos_are_model_errors() -> None:
    bare = make_tokenizer(template=None)
    with pytest.raises(ModelError, match="has no chat template"):
        prepare(Dataset.from_list(CHAT), bare, DataOptions())
    bare.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        prepare(Dataset.from_list(PLAIN), bare, DataOptions())


def test_losing_too_much_is_refused(tokenizer: Any) -> None:
    rows = Dataset.from_list([PLAIN[0]] * 8 + [PLAIN[6]] * 2)
    _, report = prepare(rows, tokenizer, DataOptions(max_length=20))
    assert report.dropped == {"prompt_fills_max_length": 2}
    assert any("2 of 10 rows dropped" in line for line in report.warnings)
    with pytest.raises(DataError, match=r"2 of 10 rows are lost \(20.0%\): 2 prompt_fills_max_length.*up to 10%"):
        prepare(rows, tokenizer, DataOptions(max_length=20, max_dropped_share=0.1))
    prepare(rows, tokenizer, DataOptions(max_length=20, max_dropped_share=0.2))


def test_what_loading_left_out_counts_as_lost(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [PLAIN[0], PLAIN[1], {**GOOD, "chosen": ""}]))
    data = load(str(path), on_bad_rows="skip")["train"]
    _, report = prepare(data, tokenizer, DataOptions())
    assert (report.rows_read, report.rows_kept, report.bad_rows) == (3, 2, {"empty_completion": 1})
    with pytest.raises(DataError, match="1 of 3 rows are lost"):
        prepare(data, tokenizer, DataOptions(max_dropped_share=0.1))


def test_where_no_row_is_left_the_reasons_and_the_first_row_are_told(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{**GOOD, "chosen": 7}, {**GOOD, "rejected": "c"}, {**GOOD, "rejected": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load(str(path), on_bad_rows="skip")
    told = str(caught.value)
    assert "no usable rows (2 identical_pair, 1 not_text left out; the first is" in told
    assert f"{path}:1, field 'chosen': " in told
    assert "bad-row counts" not in told
    mixture = {"datasets": [{"id": str(path)}]}
    with pytest.raises(DataError, match=r"dataset_mixture: no usable rows \(2 identical_pair, 1 not_text left out"):
        load(dataset_mixture=mixture, on_bad_rows="skip")
    # Ranked rows whose scores tie prefer nothing; they are paired when they are prepared.
    ties = Dataset.from_list([{"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 1.0]}] * 2)
    with pytest.raises(DataError, match=r"no usable rows \(2 no_preference left out; the first is .*same score"):
        prepare(ties, tokenizer, DataOptions(on_bad_rows="skip"), name="train")
    # Labelled answers can all be good and still make no pair.
    answers = [{"prompt": f"p{n}", "completion": "c", "label": True} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    with pytest.raises(DataError, match=r"no usable rows \(.*3 of 3 labelled answers have no counterpart"):
        load(str(path))


def test_wrong_kinds_of_data(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="needs chosen and rejected answers"):
        prepare(Dataset.from_list([{"text": "the cat"}]), tokenizer, DataOptions())
    with pytest.raises(TypeError, match="not a data set"):
        prepare([GOOD], tokenizer, DataOptions())
    with pytest.raises(DataError, match="holds no rows"):
        prepare(Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}), tokenizer, DataOptions())
    with pytest.raises(DataError, match="holds no list of token ids"):
        prepare(
            Dataset.from_list([{"prompt_ids": 1, "chosen_ids": [2], "rejected_ids": [3]}]), tokenizer, DataOptions()
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_length", 0),
        ("max_length", True),
        ("max_prompt_length", -1),
        ("truncation_mode", "keep_middle"),
        ("on_bad_rows", "ignore"),
        ("implicit_prompt", "guess"),
        ("dataset_format", "alpacca"),
        ("num_proc", 0),
        ("max_dropped_share", 1.5),
        ("quarantine_path", "q.jsonl"),
    ],
)
def test_options_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        DataOptions(**{field: value})
    assert caught.value.where == field


def test_templates_of_these_tests_differ() -> None:
    assert len(set(TEMPLATES.values())) == 4
