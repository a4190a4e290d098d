"""YAML of other people: plain values, and no more of them than somebody wrote."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest
import yaml

from preftune.config.sources import settings_from_file
from preftune.config.yaml_text import DEEPEST, MOST_CHARACTERS, TooMuch, read_yaml
from preftune.errors import ConfigError
from tests.report.test_hostile_folders import bomb

GROWING = (bomb(), bomb(4, 60), "a: &a [*a]\n", "a: &a {b: *a}\n", "x: " + "[" * 5000, "a: 1 #" + "x" * MOST_CHARACTERS)


@pytest.mark.parametrize("number", range(len(GROWING)))
def test_settings_that_grow_are_refused_in_one_line(number: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GROWING[number])
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        settings_from_file(str(path), 0)
    assert time.process_time() - began < 5
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("number", range(4))
def test_what_grows_takes_no_memory(number: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(yaml.YAMLError):
            read_yaml(GROWING[number])
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_ordinary_aliases_and_nesting_pass() -> None:
    assert read_yaml("a: &x {b: [1, 2]}\nc: *x\nd: {<<: *x, e: 3}\n")["d"] == {"b": [1, 2], "e": 3}
    assert read_yaml("a: " + "[" * (DEEPEST - 3) + "]" * (DEEPEST - 3))
    with pytest.raises(TooMuch, match="deep"):
        read_yaml("a: " + "[" * (DEEPEST + 3) + "]" * (DEEPEST + 3))
    assert read_yaml("") is None


@pytest.mark.parametrize(
    "text", ["? [a]\n: 1", "? {a: 1}\n: 1", "2001-99-99: 1", "!!set {[a]}", "!!python/object:os.x {}", "a: b: c"]
)
def test_what_cannot_be_read_is_one_kind_of_error(text: str) -> None:
    with pytest.raises((yaml.YAMLError, ValueError)):
        read_yaml(text)
