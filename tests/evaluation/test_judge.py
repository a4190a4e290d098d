"""The judge's client against a real server process: failures, limits, resuming, and nothing asked twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preftune.errors import ConfigError, SetupError
from preftune.evaluation.endpoint import key_from
from preftune.evaluation.judge import FILE_NAME, Judge, Question, read_verdict
from tests.evaluation.conftest import Start

QUESTIONS = [Question(f"question {n}", "long " * (n + 2), "short") for n in range(6)]


def test_asks_once_and_remembers(start_judge: Start, tmp_path: Path) -> None:
    server = start_judge(taste="longer")
    judge = Judge(server.url, "m", folder=tmp_path, key="secret-key-123")
    assert judge.ask([*QUESTIONS, *QUESTIONS]) == ["first"] * 12
    assert len(server.requests()) == 6
    assert judge.ask(QUESTIONS) == ["first"] * 6
    again = Judge(server.url, "m", folder=tmp_path)
    assert again.ask(QUESTIONS) == ["first"] * 6
    assert (len(server.requests()), again.num_asked, again.num_found) == (6, 0, 6)
    sent = server.requests()[0]
    assert sent["path"] == "/v1/chat/completions"
    assert sent["auth"] == "Bearer secret-key-123"
    assert (sent["body"]["model"], sent["body"]["temperature"]) == ("m", 0)
    assert not any("secret-key" in file.read_text() for file in tmp_path.glob("*.jsonl"))
    # Another judge is another question.
    Judge(server.url, "n", folder=tmp_path).ask(QUESTIONS[:1])
    assert len(server.requests()) == 7


@pytest.mark.parametrize("failure", ["500", "503", "429", "garbage", "empty", "drop", "408"])
def test_passing_failures_are_retried(start_judge: Start, tmp_path: Path, failure: str) -> None:
    server = start_judge(script=[failure, failure], taste="longer")
    judge = Judge(server.url, "m", folder=tmp_path, concurrency=1, first_wait=0.01)
    assert judge.ask(QUESTIONS[:2]) == ["first", "first"]
    assert [request["action"] for request in server.requests()] == [failure, failure, "ok", "ok"]


def test_a_slow_answer_is_given_up_and_asked_again(start_judge: Start) -> None:
    server = start_judge(script=["sleep 10"], taste="longer")
    judge = Judge(server.url, "m", concurrency=1, timeout=0.5, first_wait=0.01)
    started = time.monotonic()
    assert judge.ask(QUESTIONS[:1]) == ["first"]
    assert time.monotonic() - started < 9
    assert len(server.requests()) == 2


def test_rate_limits_hold_for_all_questions(start_judge: Start) -> None:
    server = start_judge(script=["429 1.5"], taste="longer")
    judge = Judge(server.url, "m", concurrency=1, first_wait=0.01)
    assert judge.ask(QUESTIONS[:3]) == ["first"] * 3
    times = [request["time"] for request in server.requests()]
    assert times[1] - times[0] >= 1.5


def test_retry_after_as_a_date(start_judge: Start) -> None:
    server = start_judge(script=["503 in 2.5"], taste="longer")
    assert Judge(server.url, "m", concurrency=1, first_wait=0.01).ask(QUESTIONS[:1]) == ["first"]
    times = [request["time"] for request in server.requests()]
    assert times[1] - times[0] >= 1.4  # a date has whole seconds only


def test_a_long_pause_is_not_waited_for(start_judge: Start) -> None:
    server = start_judge(script=["429 4000"])
    with pytest.raises(SetupError, match="pause of 4000 s"):
        Judge(server.url, "m", concurrency=1).ask(QUESTIONS[:1])


def test_gives_up_within_bounds_keeps_answers_and_goes_on(start_judge: Start, tmp_path: Path) -> None:
    server = start_judge(script=["ok", "ok", "500", "500", "500"], taste="longer")
    judge = Judge(server.url, "m", folder=tmp_path, concurrency=1, retries=2, first_wait=0.01)
    with pytest.raises(SetupError, match=r"failed 3 times at one question \(status 500\); 2 answers are kept.*again"):
        judge.ask(QUESTIONS)
    assert len(server.requests()) == 5
    assert Judge(server.url, "m", folder=tmp_path).ask(QUESTIONS) == ["first"] * 6
    asked = [request["body"]["messages"][1]["content"] for request in server.requests() if request["action"] == "ok"]
    assert len(asked) == len(set(asked)) == 6


@pytest.mark.parametrize(("status", "remedy"), [("401", "judge_key_env"), ("404", "/v1"), ("400", "judge_model")])
def test_refusals_are_not_retried_and_show_no_key(start_judge: Start, status: str, remedy: str) -> None:
    server = start_judge(script=[status])
    with pytest.raises(SetupError, match=remedy) as caught:
        Judge(server.url, "m", key="secret-key-123", concurrency=1).ask(QUESTIONS)
    assert len(server.requests()) == 1
    assert "secret-key" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nobody_there() -> None:
    with pytest.raises(SetupError, match="ConnectError"):
        Judge("http://127.0.0.1:9/v1", "m", retries=1, first_wait=0.01).ask(QUESTIONS[:1])


def test_unreadable_verdicts_are_kept_as_such(start_judge: Start, tmp_path: Path) -> None:
    server = start_judge(taste="mute")
    for _ in range(2):
        assert Judge(server.url, "m", folder=tmp_path).ask(QUESTIONS[:2]) == [None, None]
    assert len(server.requests()) == 2


def test_a_torn_line_is_asked_again(start_judge: Start, tmp_path: Path) -> None:
    server = start_judge(taste="longer")
    Judge(server.url, "m", folder=tmp_path).ask(QUESTIONS[:3])
    file = tmp_path / FILE_NAME
    file.write_bytes(file.read_bytes()[:-20])
    assert Judge(server.url, "m", folder=tmp_path).ask(QUESTIONS[:3]) == ["first"] * 3
    assert len(server.requests()) == 4
    assert Judge(server.url, "m", folder=tmp_path).ask(QUESTIONS[:3]) == ["first"] * 3
    assert len(server.requests()) == 4


def test_interrupted_run_goes_on(start_judge: Start, tmp_path: Path) -> None:
    server = start_judge(taste="longer", delay=1.0)
    script = (
        # A shell's background jobs inherit an ignored Ctrl-C.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from preftune.evaluation.judge import *\n"
        "qs = [Question(f'question {n}', 'long ' * (n + 2), 'short') for n in range(6)]\n"
        f"print(Judge({server.url!r}, 'm', folder={str(tmp_path)!r}, concurrency=1).ask(qs))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, env=os.environ.copy())
    for _ in range(400):
        if len(server.requests()) >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    asked = len(server.requests())
    assert 2 <= asked < 6
    assert Judge(server.url, "m", folder=tmp_path).ask(QUESTIONS) == ["first"] * 6
    # The question that was in flight was waited for: none was asked twice.
    assert len(server.requests()) == 6


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("[[A]]", "first"), ("not [[A]] but [[ b ]]", "second"), ("[[C]].", "tie"), ("B", "second"), ("A.", "first"),
     ("Both are fine", None), ("", None)],
)  # fmt: skip
def test_reads_verdicts(text: str, verdict: str | None) -> None:
    assert read_verdict(text) == verdict


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "abc")
    assert key_from("SOME_KEY") == "abc"
    assert key_from(None) is None
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ConfigError, match="SOME_KEY"):
        key_from("SOME_KEY")
