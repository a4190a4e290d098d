"""Detection and conversion of every format, against rows written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.formats import FORMATS, detect, resolve
from preftune.data.formats.base import BadRow, common_prefix
from preftune.data.pairing import expand_ranked, pair_unpaired
from preftune.errors import ConfigError, DataError

U, A, S = "user", "assistant", "system"


def m(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# name, raw row, canonical row
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "preference",
        {"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": 9, "score_rejected": 6.5, "id": 3},
        {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2.5},
    ),
    (
        "preference",
        {"prompt": [m(U, "p")], "chosen": [m(A, "c")], "rejected": [m(A, "r")], "tools": [{"n": 1}], "weight": "0.5"},
        {"prompt": [m(U, "p")], "chosen": [m(A, "c")], "rejected": [m(A, "r")], "tools": '[{"n": 1}]', "weight": 0.5},
    ),
    (
        "implicit_preference",
        {"chosen": "the sky is blue", "rejected": "the sky is green"},
        {"prompt": "the sky is", "chosen": " blue", "rejected": " green"},
    ),
    (
        "implicit_preference",
        {"chosen": [m(U, "p"), m(A, "c")], "rejected": [m(U, "p"), m(A, "r")]},
        {"prompt": [m(U, "p")], "chosen": [m(A, "c")], "rejected": [m(A, "r")]},
    ),
    (
        "hh",
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: I do",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: I do not",
        },
        {
            "prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
            "chosen": " I do",
            "rejected": " I do not",
        },
    ),
    (
        "hh",  # the transcripts part before the last turn of one of them
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: no",
        },
        {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b\n\nHuman: c\n\nAssistant: d", "rejected": " no"},
    ),
    (
        "sharegpt_preference",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "p"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "o"},
            ],
            "chosen": {"from": "gpt", "value": "c"},
            "rejected": {"from": "gpt", "value": "r"},
        },
        {
            "prompt": [
                m(S, "s"),
                m(U, "p"),
                {"role": A, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
                m("tool", "o"),
            ],
            "chosen": [m(A, "c")],
            "rejected": [m(A, "r")],
        },
    ),
    (
        "sharegpt",
        {"system": "s", "conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]},
        {"messages": [m(S, "s"), m(U, "p"), m(A, "c")]},
    ),
    (
        "alpaca_preference",
        {"instruction": "i", "input": "x", "chosen": "c", "rejected": "r", "system": "s", "history": [["q", "a"]]},
        {
            "prompt": [m(S, "s"), m(U, "q"), m(A, "a"), m(U, "i\nx")],
            "chosen": [m(A, "c")],
            "rejected": [m(A, "r")],
        },
    ),
    (
        "alpaca",
        {"instruction": "i", "input": "", "output": "o"},
        {"prompt": [m(U, "i")], "completion": [m(A, "o")]},
    ),
    (
        "ultrafeedback",
        {
            "prompt": "p",
            "prompt_id": "77",
            "chosen": [m(U, "p"), m(A, "c")],
            "rejected": [m(U, "p"), m(A, "r")],
            "messages": [m(U, "p"), m(A, "c")],
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        },
        {"prompt": [m(U, "p")], "chosen": [m(A, "c")], "rejected": [m(A, "r")], "margin": 5.0},
    ),
    (
        "orca",
        {"system": "s", "question": "q", "chosen": "c", "rejected": "r"},
        {"prompt": [m(S, "s"), m(U, "q")], "chosen": [m(A, "c")], "rejected": [m(A, "r")]},
    ),
    (
        "orca",
        {"system": "", "question": "q", "chosen": "c", "rejected": "r"},
        {"prompt": [m(U, "q")], "chosen": [m(A, "c")], "rejected": [m(A, "r")]},
    ),
    (
        "ranked",
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 3]},
        {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 3.0]},
    ),
    (
        "ranked",
        {"prompt": "p", "answers": [{"answer": "a", "rank": 2}, {"answer": "b", "rank": 1}]},
        {"prompt": "p", "responses": ["a", "b"], "scores": [-2.0, -1.0]},
    ),
    (
        "ranked",
        {
            "instruction": [m(U, "p")],
            "completions": [{"response": "a", "overall_score": 4}, {"response": "b", "overall_score": "1"}],
        },
        {"prompt": [m(U, "p")], "responses": [[m(A, "a")], [m(A, "b")]], "scores": [4.0, 1.0]},
    ),
    (
        "unpaired",
        {"prompt": "p", "completion": "c", "label": "True"},
        {"prompt": "p", "completion": "c", "label": True},
    ),
    ("unpaired", {"prompt": "p", "completion": "c", "label": 0}, {"prompt": "p", "completion": "c", "label": False}),
    ("prompt_completion", {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"}),
    ("messages", {"messages": [m(U, "p"), m(A, "c")]}, {"messages": [m(U, "p"), m(A, "c")]}),
    ("text", {"text": "t", "chat_template_kwargs": {"a": 1}}, {"text": "t", "chat_template_kwargs": {"a": 1}}),
    (
        "openai_preference",
        {
            "input": {"messages": [m(U, "p")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [m(A, "c")],
            "non_preferred_output": [m(A, "r")],
        },
        {"prompt": [m(U, "p")], "chosen": [m(A, "c")], "rejected": [m(A, "r")]},
    ),
    (
        "messages_preference",
        {"messages": [m(S, "s"), m(U, "p")], "chosen": m(A, "c"), "rejected": m(A, "r")},
        {"prompt": [m(S, "s"), m(U, "p")], "chosen": [m(A, "c")], "rejected": [m(A, "r")]},
    ),
    (
        "named_pair",
        {"query": "p", "response": "c", "rejected_response": "r", "system": "s", "history": [["q", "a"]]},
        {
            "prompt": [m(S, "s"), m(U, "q"), m(A, "a"), m(U, "p")],
            "chosen": [m(A, "c")],
            "rejected": [m(A, "r")],
        },
    ),
    (
        "two_answers",
        {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_A": 1, "score_B": 9},
        {"prompt": [m(U, "p")], "chosen": [m(A, "b")], "rejected": [m(A, "a")]},
    ),
    (
        "pointed",
        {"prompt": "p", "response_a": "a", "response_b": "b", "chosen": "response_b", "rejected": "response_a"},
        {"prompt": [m(U, "p")], "chosen": [m(A, "b")], "rejected": [m(A, "a")]},
    ),
    (
        "rated",
        {"prompt": "p", "response": "a", "helpfulness": 4, "verbosity": 1},
        {"prompt": "p", "completion": "a", "score": 4.0},
    ),
    (
        "labelled_messages",
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}], "kto_tag": False},
        {"prompt": [m(U, "p")], "completion": [m(A, "c")], "label": False},
    ),
    (
        "labelled_alpaca",
        {"instruction": "i", "input": "x", "output": "o", "kto_tag": "true"},
        {"prompt": [m(U, "i\nx")], "completion": [m(A, "o")], "label": True},
    ),
    (
        "question_answer",
        {"id": "1", "system_prompt": "s", "question": "p", "response": "c"},
        {"prompt": [m(S, "s"), m(U, "p")], "completion": [m(A, "c")]},
    ),
]


@pytest.mark.parametrize(("name", "raw", "canonical"), CASES)
def test_detected_and_converted(name: str, raw: dict[str, Any], canonical: dict[str, Any]) -> None:
    spec = detect(list(raw), raw)
    assert spec is not None
    assert spec.name == name
    assert spec.convert(raw) == canonical


def test_every_format_has_a_case() -> None:
    assert {name for name, _, _ in CASES} == set(FORMATS)


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("preference", {"prompt": "p", "chosen": "c"}, "missing_column", "rejected"),
    ("preference", {"prompt": None, "chosen": "c", "rejected": "r"}, "null", "prompt"),
    ("preference", {"prompt": 3, "chosen": "c", "rejected": "r"}, "not_text", "prompt"),
    ("preference", {"prompt": [], "chosen": "c", "rejected": "r"}, "empty_messages", "prompt"),
    ("preference", {"prompt": [{"text": "x"}], "chosen": "c", "rejected": "r"}, "malformed_message", "prompt"),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r", "weight": float("nan")}, "not_a_number", "weight"),
    (
        "preference",
        {"prompt": "p", "chosen": "c", "rejected": "r", "chat_template_kwargs": "[1]"},
        "not_a_mapping",
        "chat_template_kwargs",
    ),
    ("implicit_preference", {"chosen": "", "rejected": "r"}, "empty_completion", "chosen"),
    ("implicit_preference", {"chosen": "c", "rejected": [m(A, "r")]}, "mixed_types", "rejected"),
    (
        "hh",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
        "no_shared_prompt",
        "rejected",
    ),
    (
        "ultrafeedback",
        {"prompt": "p", "chosen": [m(U, "x"), m(A, "c")], "rejected": [m(A, "r")]},
        "no_shared_prompt",
        "rejected",
    ),
    ("sharegpt", {"system": "s", "conversations": [{"from": "system", "value": "t"}]}, "two_system_turns", "system"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "{"}]}, "malformed_message", "conversations"),
    ("alpaca", {"instruction": "i", "output": "o", "history": ["q"]}, "malformed_message", "history"),
    ("ranked", {"prompt": "p", "responses": ["a"], "scores": [1]}, "too_few_responses", "responses"),
    ("ranked", {"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "scores_do_not_match", "scores"),
    ("ranked", {"prompt": "p", "responses": [{"text": "a"}, {"text": "b"}]}, "malformed_response", "responses"),
    ("unpaired", {"prompt": "p", "completion": "c", "label": "maybe"}, "not_a_label", "label"),
]


@pytest.mark.parametrize(("name", "raw", "reason", "field"), BAD)
def test_rows_that_cannot_be_converted(name: str, raw: dict[str, Any], reason: str, field: str) -> None:
    with pytest.raises(BadRow) as caught:
        FORMATS[name].convert(raw)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert caught.value.remedy


def test_named_format_needs_its_columns() -> None:
    with pytest.raises(DataError, match="needs the columns question, chosen, rejected; missing: question"):
        resolve("orca", ["chosen", "rejected"], {}, where="x.jsonl")


def test_named_format_wins_over_detection() -> None:
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    assert resolve("auto", list(row), row, where="x").name == "hh"
    rule = "common_prefix"
    assert resolve("auto", list(row), row, where="x", implicit_prompt=rule).name == "implicit_preference"
    assert resolve("implicit_preference", list(row), row, where="x").name == "implicit_preference"


def test_unknown_columns_and_names_are_refused() -> None:
    with pytest.raises(DataError, match=r"x\.jsonl: the columns match no known data format: a, b;"):
        resolve("auto", ["b", "a"], {"a": 1, "b": 2}, where="x.jsonl")
    with pytest.raises(ConfigError, match="did you mean 'sharegpt'"):
        resolve("sharegtp", [], {}, where="x")


def test_ranked_rows_become_pairs() -> None:
    row = {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [1.0, 4.0, 1.0, 2.0], "tools": "[]"}
    assert expand_ranked(row, "best_worst") == [
        {"prompt": "p", "chosen": "b", "rejected": "a", "tools": "[]", "margin": 3.0}
    ]
    every = {(pair["chosen"], pair["rejected"]): pair["margin"] for pair in expand_ranked(row, "all")}
    assert every == {("b", "a"): 3.0, ("b", "c"): 3.0, ("b", "d"): 2.0, ("d", "a"): 1.0, ("d", "c"): 1.0}
    with pytest.raises(BadRow, match="same score"):
        expand_ranked({"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 1.0]}, "all")


def test_labelled_answers_become_pairs() -> None:
    rows = [
        {"prompt": "p", "completion": "1", "label": False},
        {"prompt": "q", "completion": "2", "label": True},
        {"prompt": "p", "completion": "3", "label": True},
        {"prompt": "p", "completion": "4", "label": True},
        {"prompt": "r", "completion": "5", "label": True},
        {"prompt": "q", "completion": "6", "label": False},
    ]
    pairs, num_left = pair_unpaired(rows, "best_worst")
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == [("p", "3", "1"), ("q", "2", "6")]
    assert num_left == 2
    pairs, num_left = pair_unpaired(rows, "all")
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == [
        ("p", "3", "1"),
        ("p", "4", "1"),
        ("q", "2", "6"),
    ]
    assert num_left == 1


@given(st.text("ab", max_size=12), st.text("ab", max_size=12))
def test_common_prefix(first: str, second: str) -> None:
    length = common_prefix(first, second)
    assert first[:length] == second[:length]
    assert length == min(len(first), len(second)) or first[length] != second[length]
    assert common_prefix(list(first), list(second)) == length
