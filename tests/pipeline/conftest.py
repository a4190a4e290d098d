"""A folder with a tiny chat model and files of rows, and a way to run what a command line prints."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from preftune.cli.main import main
from tests.export.conftest import TEMPLATE, pair_rows
from tests.models.tiny import save_tiny_model, train_tokenizer

Shell = Callable[[str], str]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, a tiny chat model; ``pairs.jsonl``, ``answers.jsonl`` and ``chats.jsonl``.

    Before a release the same is tried on a pretrained model, whose folder ``PREFTUNE_FIRST_HOUR_MODEL`` names.
    """
    folder = tmp_path_factory.mktemp("first-hour")
    rows = pair_rows(60)
    if pretrained := os.environ.get("PREFTUNE_FIRST_HOUR_MODEL"):
        (folder / "base").symlink_to(Path(pretrained).resolve())
    else:
        tokenizer = train_tokenizer([json.dumps(row) for row in rows], 320)
        tokenizer.chat_template = TEMPLATE
        save_tiny_model(folder / "base", tokenizer, initializer_range=0.2)
    files = {
        "pairs": rows,
        "answers": [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ],
        "chats": [{"messages": [*row["prompt"], *row["chosen"]]} for row in rows],
    }
    for name, part in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own beside links to model and rows, in a terminal of 80 columns that shows no colour."""
    for entry in made.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    return tmp_path


@pytest.fixture
def shell(place: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Run a command line of preftune in this process; what it printed comes back, piped and plain."""

    def run(line: str) -> str:
        words = shlex.split(line)
        assert words[0] == "preftune"
        capsys.readouterr()
        code = main(words[1:])
        told = capsys.readouterr()
        assert code == 0, f"{line}\n{told.out}{told.err}"
        assert "\x1b" not in told.out, "no colour in a pipe"
        return told.out

    return run


def start(line: str, place: Path) -> subprocess.Popen[str]:
    """Start a command line of preftune as a process of its own, its output piped."""
    words = shlex.split(line)
    assert words[0] == "preftune"
    return subprocess.Popen(
        [sys.executable, "-m", "preftune", *words[1:]],
        cwd=place,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        # A shell starts its background jobs, and what they start, deaf to Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def following(printed: str, verb: str | None = None) -> str:
    """The command that a step prints as the next one: after ``next:``, or a line below it."""
    lines = printed.split("\n")
    at = next((n for n, line in enumerate(lines) if line.startswith("next: ")), None)
    assert at is not None, printed
    commands = [lines[at].removeprefix("next: ")]
    for line in lines[at + 1 :]:
        if not line.startswith("      preftune "):
            break
        commands.append(line.strip())
    assert not any("…" in each or "..." in each or "<" in each for each in commands), commands
    found = [each for each in commands if verb is None or each.startswith(f"preftune {verb} ")]
    assert found, commands
    return found[0]
