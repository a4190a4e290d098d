"""The judge's client against endpoints that mean harm: one clear line in time and within memory, answers kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from preftune.errors import ConfigError, PreftuneError, SetupError
from preftune.evaluation.endpoint import JUDGE, MOST_BYTES, SERVER, Endpoint, Role
from preftune.evaluation.judge import FILE_NAME, Judge, Question, key_from
from preftune.evaluation.questions import Questions
from preftune.evaluation.served import read_answer
from tests.evaluation.hostile_server import WAYS, completion, hostile, whole

QUESTION = [Question("question", "first answer", "second answer")]


@pytest.mark.thin(2)
@pytest.mark.parametrize("way", WAYS)
def test_one_clear_line_within_time_and_memory(way: str, tmp_path: Path) -> None:
    with hostile(WAYS[way]) as server:
        judge = Judge(server.url, "m", folder=tmp_path, retries=1, timeout=1.0, first_wait=0.01, key="sk-0123456789")
        tracemalloc.start()
        started = time.monotonic()
        try:
            with pytest.raises(PreftuneError) as caught:
                judge.ask(QUESTION)
            assert time.monotonic() - started < 6
            assert tracemalloc.get_traced_memory()[1] < 10 * MOST_BYTES
        finally:
            tracemalloc.stop()
        line = str(caught.value)
        assert isinstance(caught.value, SetupError)
        assert line.isprintable(), line
        assert "sk-0123456789" not in line
        assert 1 <= server.num_requests <= 2
        # The key goes to the address that was named, and nowhere else.
        assert all(b"Bearer sk-0123456789" in request for request in server.heard)


@pytest.mark.thin(2)
@pytest.mark.parametrize("way", WAYS)
def test_a_server_of_samples_is_trusted_no_further(way: str) -> None:
    with hostile(WAYS[way]) as server:
        endpoint = Endpoint(server.url, "/completions", SERVER, key="sk-0123456789", timeout=1.0)
        kept: dict[str, object] = {}
        started = time.monotonic()
        with pytest.raises(SetupError, match=r"\Asampling_url: the server ") as caught:
            Questions(endpoint, retries=1, first_wait=0.01).ask(
                {"k": {}}, read_answer, kept.__setitem__, "Sampling", "text"
            )
        assert time.monotonic() - started < 6
        line = str(caught.value)
        assert line.isprintable(), line
        assert "sk-0123456789" not in line
        assert not kept
        assert all(b"Bearer sk-0123456789" in request for request in server.heard)


@pytest.mark.parametrize(
    "choice",
    [
        "text",
        {"text": 7},
        {"text": "a", "token_ids": "12"},
        {"text": "a", "token_ids": [1, None]},
        {"text": "a", "token_ids": [1, -1]},
        {"text": "a", "token_ids": [True]},
        {"text": "a", "token_ids": [1.5]},
        {"text": "a", "logprobs": [1]},
    ],
)
def test_an_answer_that_is_no_completion_is_not_kept(choice: object) -> None:
    # The server answers once on a connection, and says so: the second attempt opens another.
    with hostile(whole(json.dumps({"choices": [choice]}).encode(), Connection="close")) as server:
        endpoint = Endpoint(server.url, "/completions", SERVER, key=None, timeout=5.0)
        kept: dict[str, object] = {}
        with pytest.raises(SetupError, match=r"failed 2 times at one question .*no completion"):
            Questions(endpoint, retries=1, first_wait=0.01).ask(
                {"k": {}}, read_answer, kept.__setitem__, "Sampling", "text"
            )
        assert not kept


@pytest.mark.parametrize(
    "text",
    [
        "half a character \ud800 [[A]]",
        "\udcff\x00\x1b[2J [[A]]",
        "line\u2028separator\x85next\x0cpage [[A]]",
        "\ufffe\uffff\U0010ffff [[A]]",
        "quotes \"'\\ud800 [[A]]",
    ],
)
def test_odd_answers_are_kept_and_not_paid_for_again(text: str, tmp_path: Path) -> None:
    with hostile(whole(completion(text))) as server:
        assert Judge(server.url, "m", folder=tmp_path).ask(QUESTION) == ["first"]
        assert Judge(server.url, "m", folder=tmp_path).ask(QUESTION) == ["first"]
        assert server.num_requests == 1
    kept = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text(encoding="utf-8").split("\n") if line]
    assert [record["answer"] for record in kept] == [text]


def test_an_answer_within_the_limit_passes(tmp_path: Path) -> None:
    with hostile(whole(completion("x" * (MOST_BYTES - 1000) + "[[B]]"))) as server:
        assert Judge(server.url, "m").ask(QUESTION) == ["second"]
    import gzip

    with hostile(whole(gzip.compress(completion("[[B]]")), Content_Encoding="gzip")) as server:
        assert Judge(server.url, "m").ask(QUESTION) == ["second"]


@pytest.mark.thin(1)
@pytest.mark.parametrize("way", ["a drip", "a drip of headers", "silence", "endless body"])
def test_ctrl_c_is_heard_within_two_seconds(way: str) -> None:
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from preftune.evaluation.judge import *\n"
        "import sys; judge = Judge(sys.argv[1], 'm', timeout=600.0, retries=100)\n"
        "judge.ask([Question(str(n), 'a', 'b') for n in range(20)])\n"
    )
    with hostile(WAYS[way]) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", script, server.url], stderr=subprocess.PIPE, env=os.environ.copy(), text=True
        )
        while not server.num_requests:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, said = process.communicate(timeout=30)
        assert time.monotonic() - started < 2.0
        assert said.strip().endswith("KeyboardInterrupt")


def test_a_key_is_stripped_and_never_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "  plantedkey0001\n")
    assert key_from("SOME_KEY") == "plantedkey0001"
    for bad in (
        "planted\u00e9key0002",
        "planted key 0003",
        "planted\nkey0004",
        "planted\x7fkey0005",
        "planted\u200bkey",
    ):
        monkeypatch.setenv("SOME_KEY", bad)
        with pytest.raises(ConfigError, match="SOME_KEY: the judge's key has a character") as caught:
            key_from("SOME_KEY")
        assert "planted" not in str(caught.value)
        with pytest.raises(ConfigError):
            Judge("http://127.0.0.1:9", "m", key=bad)
    monkeypatch.setenv("SOME_KEY", " \n")
    with pytest.raises(ConfigError, match="not set"):
        key_from("SOME_KEY")


@pytest.mark.parametrize(
    "key",
    ["sk-planted0001", "hf_plantedABCDEFGH12345", "0123planted4567", "Planted9Planted9Planted9", "planted key", "a=b"],
)
@pytest.mark.parametrize("role", [JUDGE, SERVER])
def test_a_key_in_the_place_of_its_variable_is_not_quoted(key: str, role: Role) -> None:
    with pytest.raises(ConfigError, match=f"{role.key_env}: not the name of an environment variable") as caught:
        key_from(key, role)
    assert key not in str(caught.value)


def test_a_notebook_has_a_loop_of_its_own() -> None:
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    async def cell(url: str) -> list[object]:
        return list(Judge(url, "m").ask(QUESTION))

    # In a thread of its own: a browser test before this one leaves its loop running in this one.
    with hostile(whole(completion("[[A]]"))) as server, ThreadPoolExecutor(1) as notebook:
        assert notebook.submit(lambda: asyncio.run(cell(server.url))).result() == ["first"]
