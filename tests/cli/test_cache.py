"""``preftune cache info`` and ``clear``."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from preftune.cli.main import main
from preftune.references import names
from preftune.references.database import FILE_NAME
from preftune.references.store import ReferenceStore


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with two references of three and one sequences, the second unused for nine days."""
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    with ReferenceStore() as store:
        store.put_many("aa11", {bytes([n]): np.zeros(5, dtype=np.float32) for n in range(3)})
        store.put_many("ab22", {b"x": np.zeros(5, dtype=np.float32)})
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("UPDATE weights SET used = used - 9 * 86400 WHERE key = 'ab22'")
    connection.commit()
    connection.close()
    return tmp_path


def test_info_as_text(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{filled / FILE_NAME} (")
    assert [line.split()[:2] for line in lines[3:5]] == [["aa11", "3"], ["ab22", "1"]]
    assert lines[6] == f"Tokenised data: 0 files, 0 B, in {filled / 'tokens'}"


def test_info_as_json(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_entries"] == 4
    assert facts["path"] == str(filled / FILE_NAME)
    assert [item["weights_key"] for item in facts["weights"]] == ["aa11", "ab22"]


def test_info_names_the_models(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names.call("aa11", "org/model")
    with ReferenceStore() as store:
        store.put_many("aa11", {b"more": np.zeros(5, dtype=np.float32)})
        store.put_many("ab22", {b"more": np.zeros(5, dtype=np.float32)})
    assert main(["cache", "info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("aa11"))
    assert lines[at + 1] == "  org/model"
    assert sum(line.startswith("  ") for line in lines) == 1
    assert main(["cache", "info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["names"] == {"aa11": "org/model"}


def test_a_damaged_file_of_names_is_no_failure(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (filled / names.FILE_NAME).write_text("{not json", encoding="utf-8")
    assert main(["cache", "info"]) == 0
    assert "aa11" in capsys.readouterr().out


def test_info_makes_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "info", "--path", str(tmp_path / "none")]) == 0
    assert "stored yet" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flags", "removed", "left"),
    [
        ([], 4, {}),
        (["--weights_key", "aa"], 3, {"ab22": 1}),
        (["--older_than", "8d"], 1, {"aa11": 3}),
        (["--older_than", "10d"], 0, {"aa11": 3, "ab22": 1}),
        (["--older_than", "1w", "--weights_key", "aa11"], 0, {"aa11": 3, "ab22": 1}),
    ],
    ids=str,
)
def test_clear(
    filled: Path, capsys: pytest.CaptureFixture[str], flags: list[str], removed: int, left: dict[str, int]
) -> None:
    assert main(["cache", "clear", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == removed
    with ReferenceStore(filled) as store:
        assert {item.weights_key: item.num_entries for item in store.info().weights} == left


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--weights_key", "a"], "several references fit; got 'a'; allowed: aa11, ab22"),
        (["--weights_key", "zz"], "no stored reference fits"),
        (["--older_than", "soon"], "--older_than: not an age; got 'soon'"),
    ],
    ids=str,
)
def test_clear_refuses_what_it_cannot_read(
    filled: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["cache", "clear", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    with ReferenceStore(filled) as store:
        assert store.info().num_entries == 4


def test_a_corrupt_store_is_named_and_clear_moves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"hello " * 1000)
    assert main(["cache", "info", "--path", str(tmp_path)]) == 5
    error = capsys.readouterr().err
    assert "`preftune cache clear`" in error
    assert error.count("\n") == 1
    assert main(["cache", "clear", "--path", str(tmp_path)]) == 0
    assert "has been moved to" in capsys.readouterr().out
    assert main(["cache", "info", "--path", str(tmp_path)]) == 0
