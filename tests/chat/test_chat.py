"""Conversations: what is asked, what each side remembers, and the command with and without a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from preftune.chat import open_session
from preftune.chat.session import Answer, Side
from preftune.chat.terminal import talk
from preftune.cli.main import main
from preftune.errors import ConfigError
from preftune.models.tuned import find_tuned
from tests.export.conftest import MakeRun


def last(session: Any, question: str) -> dict[str, str]:
    *_, answers = session.ask(question)
    return {answer.label: answer.text for answer in answers}


def test_both_sides_answer_as_each_alone(make_run: MakeRun) -> None:
    tuned = find_tuned(make_run())
    settings: dict[str, Any] = {"dtype": "float32", "max_new_tokens": 12, "temperature": 1.0, "seed": 4}
    both, notes = open_session(tuned, **settings)
    assert not notes
    assert both.one_pass
    alone = {only: open_session(tuned, only=only, **settings)[0] for only in ("tuned", "reference")}
    for question in ("the film", "and the plot?"):
        found = last(both, question)
        assert found == {label: last(session, question)[label] for label, session in alone.items()}
    assert found["tuned"] != found["reference"]


def test_an_adapter_that_cannot_be_switched_by_row_and_full_weights(make_run: MakeRun) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "max_new_tokens": 8, "temperature": 0.0}
    for run in (make_run(use_dora=True), make_run(full=True)):
        tuned = find_tuned(run)
        both, _ = open_session(tuned, **settings)
        assert not both.one_pass
        found = last(both, "a dull plot")
        for only in ("tuned", "reference"):
            assert last(open_session(tuned, only=only, **settings)[0], "a dull plot")[only] == found[only]


def test_the_answer_is_the_greedy_one_of_the_chat_template(make_run: MakeRun, base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tuned = find_tuned(make_run())
    session, _ = open_session(tuned, dtype="float32", temperature=0.0, max_new_tokens=10, only="reference")
    model: Any = AutoModelForCausalLM.from_pretrained(base / "base")
    tokenizer: Any = AutoTokenizer.from_pretrained(base / "base")
    messages: list[dict[str, str]] = []
    for question in ("the film", "why?"):
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=10, do_sample=False)
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert last(session, question)["reference"] == expected.rstrip("\ufffd")
        messages.append({"role": "assistant", "content": expected.rstrip("\ufffd")})


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_went(make_run: MakeRun) -> None:
    session, _ = open_session(find_tuned(make_run()), dtype="float32", max_new_tokens=30, temperature=1.0)
    answers = session.ask("the film")
    for _ in range(3):
        said = [answer.text for answer in next(answers)]
    answers.close()
    assert [side.messages[-1]["content"] for side in session.sides] == said
    session.restart()
    assert [side.messages for side in session.sides] == [[], []]


def test_a_conversation_beyond_the_positions_is_refused_and_forgotten(make_run: MakeRun) -> None:
    session, _ = open_session(find_tuned(make_run()), dtype="float32", max_new_tokens=4)
    with pytest.raises(ConfigError, match="longer than the model's 2048 positions"):
        last(session, "film " * 2500)
    assert last(session, "film").keys() == {"tuned", "reference"}
    assert [len(side.messages) for side in session.sides] == [2, 2]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens: out of range"),
        (["--temperature", "-1"], "--temperature: out of range"),
        (["--temperature", "nan"], "--temperature: out of range"),
        (["--only", "both"], "argument --only"),
    ],
)
def test_wrong_settings_are_one_line(
    make_run: MakeRun,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    what: str,
) -> None:
    run = make_run()
    capsys.readouterr()
    assert main(["chat", str(run), *flags]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert what in said[0]


def start(run: Path, *flags: str, **keywords: Any) -> subprocess.Popen[bytes]:
    # A shell that runs the tests in the background has Ctrl-C ignored, and children inherit that.
    script = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "runpy.run_module('preftune', run_name='__main__', alter_sys=True)\n"
    )
    command = [sys.executable, "-c", script, "chat", str(run), "--dtype", "float32", *flags]
    return subprocess.Popen(command, env={**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}, **keywords)


@pytest.mark.slow
def test_every_line_of_a_pipe_is_a_question(make_run: MakeRun) -> None:
    pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(make_run(), "--max_new_tokens", "5", "--temperature", "0", **pipe)
    out, err = process.communicate(b"the film\n\n/new\nthe film\n", timeout=300)
    assert (process.returncode, err) == (0, b"")
    answers = [part for part in out.decode().split("tuned> ") if part]
    assert len(answers) == 2
    assert answers[0] == answers[1], "greedy, and begun anew"
    assert all(answer.count("reference> ") == 1 for answer in answers)
    assert b"\x1b" not in out


def read_until(handle: int, wanted: bytes, seconds: float = 240.0, meanwhile: Any = None) -> bytes:
    seen, end = b"", time.monotonic() + seconds
    while wanted not in seen:
        assert time.monotonic() < end, seen
        if meanwhile is not None:
            meanwhile()
        if select.select([handle], [], [], 1.0)[0]:
            seen += os.read(handle, 65536)
    return seen


@pytest.mark.slow
def test_in_a_terminal_answers_stand_side_by_side_and_ctrl_c_ends(make_run: MakeRun) -> None:
    leader, follower = pty.openpty()
    process = start(
        make_run(), "--max_new_tokens", "20", stdin=follower, stdout=follower, stderr=follower, start_new_session=True
    )
    os.close(follower)
    try:
        read_until(leader, b"you> ")
        os.write(leader, b"the film\n")
        seen = read_until(leader, b"you> ")
        assert b"tuned (" in seen
        assert b"reference (" in seen
        # Between the prompt and the wait for a line, Python hears of it with the next key alone: people press it again.
        read_until(leader, b"interrupted", meanwhile=lambda: os.kill(process.pid, signal.SIGINT))
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(leader)


@pytest.mark.parametrize("width", [60, 100])
def test_ctrl_c_stops_an_answer_and_not_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    class Interrupted:
        sides = (Side("tuned", None), Side("reference", None))

        def ask(self, question: str) -> Any:
            yield [Answer("tuned", f"so far {question}", 2), Answer("reference", "well", 1)]
            raise KeyboardInterrupt

    monkeypatch.setattr("preftune.chat.terminal._questions", lambda interactive: iter(["one", "two"]))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    session: Any = Interrupted()
    talk(session, Console(force_terminal=True, highlight=False, width=width, height=20))
    said = capsys.readouterr().out
    assert said.count("(stopped)") == 2
    for words in ("so far one", "so far two", "well"):
        assert words in said
