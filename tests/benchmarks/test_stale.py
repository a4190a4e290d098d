"""Results know what they were made with."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import stale


def repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stale, "ROOT", root)
    (root / "src").mkdir()
    (root / "src" / "a.py").write_text("one = 1\n", encoding="utf-8")
    (root / "src" / "b.py").write_text("two = 2\n", encoding="utf-8")
    return root


def test_a_result_is_stale_when_what_it_depends_on_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = repository(tmp_path, monkeypatch)
    result = {stale.KEY: stale.stamp("src/a.py")}
    assert stale.why_stale(result) is None
    (root / "src" / "b.py").write_text("two = 3\n", encoding="utf-8")
    assert stale.why_stale(result) is None
    (root / "src" / "a.py").write_text("one = 2\n", encoding="utf-8")
    assert "changed since" in str(stale.why_stale(result))
    (root / "src" / "a.py").write_text("one = 1\n", encoding="utf-8")
    assert stale.why_stale(result) is None


BEFORE = '''"""What it is."""


def double(value: str) -> str:
    """Twice."""
    text = "# not a comment"  # a comment
    if not value:
        raise ValueError(
            "empty",
        )
    return text + value * 2
'''


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("What it is.", "What it is,\nat length.", False),
        ("Twice.", "Two times.", False),
        ("  # a comment", "", False),
        ("    return", "\n    # why\n    return", False),
        ("# not a comment", "# nor this one", True),
        ('"empty"', '"there is nothing"', False),
        ("not value", "value", True),
        ("* 2", "* 3", True),
        ("    return", "    if text:\n        return", True),
        ('    """Twice."""\n', '    value = """Twice."""\n', True),
    ],
)
def test_words_do_not_count_and_code_does(old: str, new: str, changed: bool) -> None:
    after = BEFORE.replace(old, new)
    assert after != BEFORE
    assert (stale.code_of(after) != stale.code_of(BEFORE)) is changed


@pytest.mark.parametrize("change", ["new", "gone", "renamed"])
def test_files_that_come_and_go_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    root = repository(tmp_path, monkeypatch)
    result = {stale.KEY: stale.stamp("src/*.py")}
    if change == "new":
        (root / "src" / "c.py").write_text("", encoding="utf-8")
    elif change == "gone":
        (root / "src" / "b.py").unlink()
    else:
        (root / "src" / "b.py").rename(root / "src" / "d.py")
    assert stale.why_stale(result) is not None


@pytest.mark.parametrize("content", [{}, [], {"sources": {}}, {"sources": {"patterns": [], "digest": "x"}}])
def test_a_result_without_a_record_is_stale(content: object) -> None:
    assert stale.why_stale(content) == "no record of what it was made with"


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="matches no file"):
        stale.stamp("src/missing.py")


def test_documents_name_files_that_exist(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("nothing\n", encoding="utf-8")
    page = tmp_path / "docs" / "speed.md"
    page.write_text("| a | 1.5 |\n", encoding="utf-8")
    assert list(stale.faults(tmp_path)) == ["docs/speed.md: has figures in a table and names no result file"]
    page.write_text("| a | 1.5 |\n`benchmarks/results/speed.json`\n", encoding="utf-8")
    assert list(stale.faults(tmp_path)) == ["docs/speed.md: benchmarks/results/speed.json does not exist"]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "speed.json").write_text("{}", encoding="utf-8")
    assert list(stale.faults(tmp_path)) == []
    page.write_text("| a | 1.5 |\nThese figures are not kept as result files.\n", encoding="utf-8")
    assert list(stale.faults(tmp_path)) == []


def test_the_documents_here_are_in_order() -> None:
    assert list(stale.faults()) == []
