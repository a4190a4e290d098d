"""Splitting command lines and reading YAML files."""

from __future__ import annotations

from pathlib import Path

import pytest

from preftune.config.sources import settings_from_file, split_command_line
from preftune.errors import ConfigError


def test_flags_in_every_form() -> None:
    line = split_command_line(
        ["--a", "1", "--b-c=x=y", "--d", "e", "f", "--neg", "-0.5", "--bare", "--config", "r.yaml"]
    )
    assert line.flags == (
        ("a", ("1",), "--a"),
        ("b_c", ("x=y",), "--b-c"),
        ("d", ("e", "f"), "--d"),
        ("neg", ("-0.5",), "--neg"),
        ("bare", (), "--bare"),
    )
    assert line.configs == ("r.yaml",)


def test_a_yaml_file_may_come_first() -> None:
    assert split_command_line(["r.yaml", "--a", "1"]).configs == ("r.yaml",)


@pytest.mark.parametrize("argv", [["stray"], ["-x"], ["--a=1", "stray"], ["--config"]])
def test_stray_arguments_are_refused(argv: list[str]) -> None:
    with pytest.raises(ConfigError):
        split_command_line(argv)


def test_every_key_knows_its_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("# a comment\nbeta: 0.1\n\nlearning-rate: 1e-6\n", encoding="utf-8")
    found = settings_from_file(str(file), 0)
    assert [(s.name, s.value, s.where) for s in found] == [
        ("beta", 0.1, f"{file}:2"),
        ("learning_rate", "1e-6", f"{file}:4"),
    ]


def test_merge_keys_may_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("base: &b {beta: 0.1}\n<<: *b\nbeta: 0.2\n", encoding="utf-8")
    assert {s.name: s.value for s in settings_from_file(str(file), 0)}["beta"] == 0.2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("beta: 0.1\nbeta: 0.2\n", ":2: 'beta' is set twice"),
        ("a: [1\n", "not valid YAML"),
        ("- a\n- b\n", "not a mapping"),
        ("just text", "not a mapping"),
        ("on: 1\n", "not text"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("a: \x01\n", "not valid YAML"),
        ("a: 2024-13-45\n", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        settings_from_file(str(file), 0)
    assert says in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        settings_from_file(str(tmp_path / "none.yaml"), 0)
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        settings_from_file(str(tmp_path / "latin.yaml"), 0)


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing\n", encoding="utf-8")
    assert settings_from_file(str(tmp_path / "r.yaml"), 0) == []
