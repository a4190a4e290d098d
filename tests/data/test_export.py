"""``preftune data convert`` and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftune.cli.data import main
from preftune.data import load, load_report
from preftune.data.export import columns_told, write
from preftune.errors import ConfigError
from tests.data.conftest import assistant, user

CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": None}}}
ROWS: list[dict[str, Any]] = [
    {"messages": [user("p"), assistant("c")], "rejected_response": "r", "id": 1},
    {"messages": [user("q"), {**assistant("d"), "tool_calls": [CALL]}], "rejected_response": "s", "id": 2},
]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_what_is_written_is_read_as_the_same(ending: str, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    rows = load(str(source))["train"]
    assert write(rows, tmp_path / f"out{ending}") == 2
    again = load(str(tmp_path / f"out{ending}"))["train"]
    assert again.to_list() == rows.to_list()
    report = load_report(again)
    assert report is not None
    assert set(report.formats.values()) == {"preference"}


def test_the_verb_says_what_it_understood(tmp_path: Path, capsys: Any) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / "sub" / "out.jsonl"
    bad = {"messages": [user("p")], "rejected_response": "r", "id": 3}
    transcript = {"messages": [user("a"), assistant("b")], "rejected_response": "", "id": 4}
    source.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, bad, transcript]), encoding="utf-8")
    assert main(["convert", "--dataset_name", str(source), "--out", str(target)]) == 0
    out = capsys.readouterr().out
    assert "format: messages_preference" in out
    assert "columns not used: id" in out
    assert "1 no_answer" in out
    assert "1 empty_completion" in out
    assert "wrote 2 rows" in out
    assert f"preftune data show --dataset_name {target}" in out
    assert len(target.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(("verb", "columns"), [("kto", {"prompt", "completion", "label"}), ("sft", {"messages"})])
def test_other_verbs(verb: str, columns: set[str], tmp_path: Path) -> None:
    source, target = tmp_path / "a.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps([{"conversations": [user("p"), assistant("c")], "kto_tag": True}]), encoding="utf-8")
    main(["convert", "--dataset_name", str(source), "--out", str(target), "--verb", verb])
    assert set(json.loads(target.read_text(encoding="utf-8"))) == columns


@pytest.mark.parametrize("arguments", [[], ["--out", "x.txt"], ["--out", "."]])
def test_a_target_that_cannot_be_written_is_refused_before_anything_is_read(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="--out"):
        main(["convert", "--dataset_name", "nowhere.jsonl", *arguments])


@pytest.mark.parametrize("kind", ["the data", "another file", "a link to nothing"])
def test_a_file_that_exists_is_left_as_it_is(kind: str, tmp_path: Path) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    if kind == "the data":
        target = source
    elif kind == "another file":
        target.write_text("precious", encoding="utf-8")
    else:
        target.symlink_to(tmp_path / "nowhere.jsonl")
    before = {path.name: path.read_bytes() if path.exists() else b"" for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="left as it is"):
        main(["convert", "--dataset_name", str(source), "--out", str(target)])
    assert {path.name: path.read_bytes() if path.exists() else b"" for path in tmp_path.iterdir()} == before


def test_columns_in_words() -> None:
    told = columns_told({"prompt": "the prompt", "id": "not used", "x": "not used"})
    assert told == ["columns used: prompt (the prompt)", "columns not used: id, x"]
