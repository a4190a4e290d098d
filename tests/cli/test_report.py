"""`preftune report`: what it writes, says and refuses."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import pytest

from preftune.cli.main import main
from tests.report.folders import make_trl_run


def test_the_page_is_written_where_it_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trl_run(tmp_path / "run")
    out = tmp_path / "pages" / "mine.html"
    assert main(["report", str(tmp_path / "run"), "--out", str(out), "--title", "My runs"]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {out} (")
    assert "<h1>My runs</h1>" in out.read_text(encoding="utf-8")
    assert [path.name for path in out.parent.iterdir()] == ["mine.html"]


def test_nothing_to_report_on_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nothing to report on" in error
    assert not out.exists()


@pytest.mark.parametrize("works", [True, False])
def test_open_shows_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], works: bool
) -> None:
    shown: list[str] = []

    def opened(address: str) -> bool:
        shown.append(address)
        return works

    monkeypatch.setattr(webbrowser, "open", opened)
    make_trl_run(tmp_path / "run")
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path / "run"), "--out", str(out), "--open"]) == 0
    assert shown == [out.resolve().as_uri()]
    assert ("open the file by hand" in capsys.readouterr().out) is not works
