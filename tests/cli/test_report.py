"""`preftune report`: what it writes, says and refuses."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path

import pytest

from preftune.cli.main import main
from tests.report.folders import make_sweep, make_trl_run


def test_the_page_is_written_where_it_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trl_run(tmp_path / "run")
    out = tmp_path / "pages" / "mine.html"
    assert main(["report", str(tmp_path / "run"), "--out", str(out), "--title", "My runs"]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {out} (")
    assert "<h1>My runs</h1>" in out.read_text(encoding="utf-8")
    assert [path.name for path in out.parent.iterdir()] == ["mine.html"]


def test_what_the_page_says_of_a_sweep_comes_first_with_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_sweep(Path("grid"), with_runs=False)
    content = json.loads(Path("grid/sweep.json").read_text(encoding="utf-8"))
    content["best"]["reason"] = "trial 4 has the best figure"
    Path("grid/sweep.json").write_text(json.dumps({**content, "verb": "orpo"}), encoding="utf-8")
    Path("grid/best.yaml").write_text("beta: 0.1\n", encoding="utf-8")
    assert main(["report", "grid", "--out", "page.html"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "grid: sweet spot beta 0.1, learning_rate 1e-05. Trial 4 has the best figure."
    assert said[-1] == "next: preftune orpo --config grid/best.yaml"


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
