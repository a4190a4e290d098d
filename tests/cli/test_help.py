"""Help of the training verbs: at once, from a table that says what the classes say."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from preftune.cli import help_table
from preftune.cli.data import ACTIONS
from preftune.cli.help import help_of
from preftune.cli.main import main
from preftune.cli.verbs import TRAINING_VERBS, VERBS


def shipped() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(help_table.SHIPPED.read_text(encoding="utf-8"))
    return found


def test_the_table_of_the_package_is_current() -> None:
    assert shipped()["versions"] == help_table.versions(), "made with other versions of transformers and torch"
    made = json.loads(json.dumps(help_table.build()))
    assert shipped() == made, "run python -m preftune.cli.help_table"


@pytest.mark.parametrize("verb", TRAINING_VERBS)
def test_what_most_runs_set_comes_first(verb: str) -> None:
    text = help_of(verb, help_table.sections_of_verb(verb))
    first = text.split("most used:")[1].split("data and behaviour:")[0]
    names = [line.split()[0] for line in first.splitlines() if line.startswith("  --")]
    assert len(names) == 10
    assert names[:3] == ["--model_name_or_path", "--dataset_name", "--output_dir"]
    assert "--learning_rate" in names
    assert f"example: preftune {verb} --model_name_or_path " in text
    for name in names:
        assert text.count(f"\n  {name} ") == 1


@pytest.mark.parametrize("verb", ["dpo", "sft"])
def test_help_of_a_training_verb_takes_less_than_a_second(verb: str) -> None:
    program = (
        f"import sys; from preftune.cli.main import main; main([{verb!r}, '--help']);"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60, env=environment)
        best = min(best, time.perf_counter() - started)
    print(f"preftune {verb} --help: {best:.3f} s")
    assert best < 1


@pytest.fixture
def other_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Versions that the package's table was not made with; where the cache is."""
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(help_table, "versions", lambda: {"transformers": "5.99", "torch": "2.99"})
    return tmp_path / "help_table.json"


def test_with_other_versions_the_classes_are_read_once(other_versions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = help_table.sections_of_verb("kto")
    assert any(entry.name == "desirable_weight" for _, entries in found for entry in entries)
    monkeypatch.setattr(help_table, "build", lambda: pytest.fail("read twice"))
    assert help_table.sections_of_verb("kto") == found
    other_versions.write_text("{}", encoding="utf-8")
    with pytest.raises(pytest.fail.Exception):
        help_table.sections_of_verb("kto")


def test_a_table_that_is_older_than_the_classes_is_made_anew(
    other_versions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    help_table.sections_of_verb("sft")
    os.utime(other_versions, (0, 0))
    monkeypatch.setattr(help_table, "build", lambda: pytest.fail("made anew"))
    with pytest.raises(pytest.fail.Exception):
        help_table.sections_of_verb("sft")


def test_help_needs_no_cache(other_versions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = other_versions.with_name("a file")
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("PREFTUNE_CACHE", str(blocked))
    assert help_table.sections_of_verb("orpo")


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("verb", ["", *VERBS, *(f"data {action}" for action in ACTIONS)])
def test_help_fits_the_terminal(
    verb: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with contextlib.suppress(SystemExit):
        main([*verb.split(), "--help"])
    shown = capsys.readouterr().out.splitlines()
    # An example is there to be copied; argparse does not break its lists of choices.
    may_wrap = [line for line in shown if not line.startswith("example: ") and "{" not in line]
    wide = [line for line in may_wrap if len(line) > columns]
    assert len(shown) > 5
    assert wide == []
