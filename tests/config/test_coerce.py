"""Values from YAML and flags to typed values."""

from __future__ import annotations

import json
import math
from enum import Enum
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from preftune.config.coercion import Mismatch, coerce


class Pace(Enum):
    NO = "no"
    STEPS = "steps"


finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("1e-6", float, 1e-6),
        ("5", float, 5.0),
        (3, float, 3.0),
        ("1_000", int, 1000),
        ("1e3", int, 1000),
        (2.0, int, 2),
        ("true", bool, True),
        ("No", bool, False),
        (1, bool, True),
        (False, Pace, Pace.NO),
        ("steps", Pace | str, Pace.STEPS),
        ("a", list[str], ["a"]),
        (["1", "2"], list[float], [1.0, 2.0]),
        ("a", str | list[str], "a"),
        (["a", "b"], str | list[str], ["a", "b"]),
        ({"lr": "1e-7"}, dict[str, Any] | None, {"lr": 1e-7}),
        ('{"lr": 1e-7}', dict[str, Any] | str | None, {"lr": 1e-7}),
        ("ds.json", dict[str, Any] | str | None, "ds.json"),
        (None, int | None, None),
        (7, str, "7"),
        ("auto", int | str | None, "auto"),
        ("64", int | str | None, 64),
        ("false", str | Literal[False] | None, False),
        (True, bool | str | None, True),
        ("out/checkpoint-5", bool | str | None, "out/checkpoint-5"),
    ],
)
def test_fits(value: Any, annotation: Any, expected: Any) -> None:
    found = coerce(value, annotation)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("[a, b]", list[str], ["a", "b"]),
        ('["a,b"]', list[str], ["a,b"]),
        ("q_proj,v_proj", list[str] | None, ["q_proj", "v_proj"]),
        (r".*\.(q|v)_proj", str | list[str] | None, r".*\.(q|v)_proj"),
        ("null", float | None, None),
        ("none", float | None, None),
        ("none", str | None, "none"),
        ("true", bool | str | None, True),
    ],
)
def test_fits_from_a_flag(value: Any, annotation: Any, expected: Any) -> None:
    assert coerce(value, annotation, text=True) == expected


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("abc", float),
        ("nan", float),
        ("inf", float),
        (math.inf, float),
        (True, float),
        (True, int),
        ("1.5", int),
        (1.5, int),
        ("maybe", bool),
        (2, bool),
        (None, int),
        ("step", Pace | str),
        (True, str),
        (1.1, str),
        (["a"], str),
        ({"a": 1}, list[str]),
        ("a", dict[str, Any]),
        ("1" * 400, int),
        ({"a": 1}, int | None),
    ],
)
def test_refuses(value: Any, annotation: Any) -> None:
    with pytest.raises(Mismatch):
        coerce(value, annotation)


def test_choices_hold_inside_lists() -> None:
    assert coerce(["a"], list[str], choices=("a", "b")) == ["a"]
    with pytest.raises(Mismatch):
        coerce(["a", "c"], list[str], choices=("a", "b"))


@given(finite)
def test_numbers_survive_flags_and_yaml(number: float) -> None:
    assert coerce(repr(number), float, text=True) == number
    assert coerce(yaml.safe_load(yaml.safe_dump(number)), float) == number


@given(st.integers(-(10**25), 10**25))
def test_whole_numbers_survive_beyond_what_floats_hold(number: int) -> None:
    assert coerce(str(number), int, text=True) == number
    assert coerce(number, int) == number


@given(words)
def test_text_survives(text: str) -> None:
    assert coerce(text, str, text=True) == text
    assert coerce(yaml.safe_load(yaml.safe_dump(text)), str) == text


@given(st.lists(words, min_size=1))
def test_lists_survive_as_json_flag_and_as_yaml(items: list[str]) -> None:
    assert coerce(json.dumps(items), list[str], text=True) == items
    assert coerce(yaml.safe_load(yaml.safe_dump(items)), list[str]) == items


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | finite | words,
        lambda inner: st.lists(inner) | st.dictionaries(words, inner),
    )
)
def test_anything_is_taken_or_refused_never_a_crash(value: Any) -> None:
    for annotation in (int, float | None, bool, str | None, list[str] | None, dict[str, Any], Pace, Literal["a", 1]):
        for text in (True, False):
            why = "taken"
            try:
                coerce(value, annotation, text=text)
            except Mismatch as reason:
                why = reason.why
            assert why
