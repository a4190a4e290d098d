"""Many tabs, many prompts and a run that means harm: the list answers at once, and the server ends when told to."""

from __future__ import annotations

import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from preftune.errors import DataError
from preftune.ui.logs import Logs
from tests.report.folders import make_run, write_json
from tests.ui.conftest import Server, start


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of a model that goes on for as long as it may."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.models.tiny import train_tokenizer

    folder = tmp_path_factory.mktemp("crowd") / "weights"
    tokenizer = train_tokenizer(["a nice dull good bad very film plot slow"], 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    # The token that ends a text is never the likeliest one.
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def poison(folder: Path) -> None:
    """A run in which nothing is what it should be."""
    make_run(folder, num_steps=5)
    deep = "[" * 600 + "]" * 600
    with (folder / "log.jsonl").open("w") as file:
        file.write(f'{{"event": "begin", "step": {deep}, "max_steps": {deep}}}\n')
        file.write('{"event": "begin", "step": "x"}\n{"step": "7", "logs": {"loss": 1}}\n{"step": null, "logs": {}}\n')
        file.write('{"logs": {"loss": 1e999}, "step": [1]}\n' * 20_000 + '{"event": "' + "x" * 3_000_000 + '"}\n')
    with (folder / "alarms.jsonl").open("w") as file:
        file.write(f'{{"step": {deep}}}\n' * 50 + '{"step": {}}\n' * 5_000)
    (folder / "trainer_state.json").write_text(f'{{"log_history": {deep}, "global_step": "9"}}')
    write_json(
        folder / "provenance.json", {"settings": [1], "plan": 3, "data": {"train": {"names": 3, "num_rows": "x"}}}
    )


@pytest.fixture
def crowded(tmp_path: Path, trained: Path) -> Iterator[tuple[subprocess.Popen[str], Server]]:
    root = tmp_path / "root"
    for name in ("one", "two", "three"):
        make_run(root / name, num_steps=30)
    poison(root / "poisoned")
    run = make_run(root / "trained", num_steps=5)
    for file in trained.iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    process, server = start(root)
    with process:
        yield process, server
        process.kill()


def ask(server: Server, key: str, answers: list[tuple[int, Any]], tokens: int = 1024) -> None:
    try:
        answers.append(server.post("prompt", {"id": key, "prompt": "nice", "max_new_tokens": tokens, "temperature": 0}))
    except (OSError, ValueError, http.client.HTTPException):
        answers.append((0, None))


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def begin_one(server: Server, process: subprocess.Popen[str], tokens: int) -> http.client.HTTPConnection:
    """A prompt that is being answered."""
    body = json.dumps({"id": server.key("trained"), "prompt": "nice", "max_new_tokens": tokens, "temperature": 0})
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    headers = {"Origin": f"http://127.0.0.1:{server.port}", "Content-Type": "application/json"}
    connection.request("POST", f"/{server.token}/prompt", body, headers)
    end = time.monotonic() + 60
    while not children(process):
        assert time.monotonic() < end
        time.sleep(0.05)
    return connection


@pytest.mark.slow
def test_twelve_tabs_forty_prompts_and_a_poisoned_run(crowded: tuple[subprocess.Popen[str], Server]) -> None:
    _, server = crowded
    key, poisoned = server.key("trained"), server.key("poisoned")
    labels = {entry["label"] for entry in json.loads(server.get("list")[1])}
    assert labels == {"one", "two", "three", "poisoned", "trained"}
    assert server.get(f"view?id={poisoned}&id={server.key('one')}")[0] == 200
    done = threading.Event()

    def tab(number: int) -> None:
        """A page that is open: it asks for changes every second, and for news now and then."""
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        while not done.wait(1.0):
            for path in (f"changes?id={poisoned}&id={key}", *([f"news?id={poisoned}"] if number % 4 == 0 else [])):
                connection.request("GET", f"/{server.token}/{path}")
                assert connection.getresponse().read()
        connection.close()

    tabs = [threading.Thread(target=tab, args=(number,), daemon=True) for number in range(12)]
    answers: list[tuple[int, Any]] = []
    prompts = [threading.Thread(target=ask, args=(server, key, answers), daemon=True) for _ in range(40)]
    for thread in (*tabs, *prompts):
        thread.start()
    took = []
    for _ in range(40):
        began = time.monotonic()
        assert len(json.loads(server.get("list")[1])) == 5
        took.append(time.monotonic() - began)
        time.sleep(0.1)
    # One is being answered; the others were told so at once, and hold no connection.
    refused = [said for status, said in answers if status == 409]
    assert len(refused) >= 39
    assert {said["error"] for said in refused} == {
        "prompt: another prompt is being answered; try again when it is done"
    }
    assert statistics.median(took) < 0.1, took
    done.set()
    for thread in prompts:
        thread.join(120)
    assert sorted(status for status, _ in answers) == [200] + [409] * 39


@pytest.mark.slow
def test_a_prompt_whose_client_has_left_is_given_up(crowded: tuple[subprocess.Popen[str], Server]) -> None:
    process, server = crowded
    # Loaded, so that what follows is generating and not loading.
    assert server.post("prompt", {"id": server.key("trained"), "prompt": "nice", "max_new_tokens": 2})[0] == 200
    (helper,) = children(process)
    connection = begin_one(server, process, 1024)
    time.sleep(0.5)
    assert server.post("prompt", {"id": server.key("trained"), "prompt": "nice"})[0] == 409
    connection.close()
    end = time.monotonic() + 2
    while server.post("prompt", {"id": server.key("trained"), "prompt": "nice", "max_new_tokens": 1})[0] != 200:
        assert time.monotonic() < end
        time.sleep(0.1)
    # Stopped, not killed: the model is still loaded.
    assert children(process) == [helper]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_within_two_seconds(crowded: tuple[subprocess.Popen[str], Server], number: signal.Signals) -> None:
    process, server = crowded
    connection = begin_one(server, process, 1024)
    left = children(process)
    process.send_signal(number)
    began = time.monotonic()
    assert process.wait(timeout=30) in (0, -number)
    assert time.monotonic() - began < 2.0
    _, alive = psutil.wait_procs(left, timeout=2)
    assert alive == []
    connection.close()


@pytest.mark.slow
def test_nothing_is_left_by_a_server_that_was_killed(crowded: tuple[subprocess.Popen[str], Server]) -> None:
    process, server = crowded
    connection = begin_one(server, process, 1024)
    left = children(process)
    process.kill()
    # Generating goes on for a moment, in a thread that does not look; the input's end is what it dies of.
    _, alive = psutil.wait_procs(left, timeout=5)
    assert alive == []
    connection.close()


@pytest.mark.slow
def test_a_helper_that_dies_is_one_line_and_replaced(crowded: tuple[subprocess.Popen[str], Server]) -> None:
    process, server = crowded
    answers: list[tuple[int, Any]] = []
    thread = threading.Thread(target=ask, args=(server, server.key("trained"), answers))
    thread.start()
    while not children(process):
        time.sleep(0.05)
    children(process)[0].kill()
    thread.join(60)
    ((status, said),) = answers
    assert (status, "its process ended" in said["error"]) == (409, True)
    assert server.post("prompt", {"id": server.key("trained"), "prompt": "nice", "max_new_tokens": 1})[0] == 200


@pytest.mark.slow
def test_modules_of_the_current_folder_are_not_imported(tmp_path: Path, trained: Path) -> None:
    """A folder of somebody else's may hold files with the names of modules."""
    root = tmp_path / "root"
    run = make_run(root / "run", num_steps=3)
    for file in trained.iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    for name in ("json", "queue", "torch", "preftune"):
        (root / f"{name}.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    code = "import sys; from preftune.cli.main import main; sys.path[:] = [p for p in sys.path if p]; main(['ui', '.'])"
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        _, _, place, token, _ = process.stdout.readline().split("open ", 1)[1].split("/")
        server = Server(root, int(place.partition(":")[2]), token)
        assert server.post("prompt", {"id": server.key("run"), "prompt": "nice", "max_new_tokens": 1})[0] == 200
        process.kill()
    assert not (tmp_path / "owned").exists()


def test_a_huge_log_is_read_at_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    line = json.dumps({"time": 1.0, "step": 1, "logs": {"loss": 1.0}}) + "\n"
    with path.open("w") as file:
        file.write(json.dumps({"event": "begin", "pid": 7, "max_steps": 9}) + "\n")
        file.write(line)
        file.truncate(4 * 2**30)
        file.seek(4 * 2**30)
        file.write("\n" + json.dumps({"time": 1.0, "step": 8, "logs": {"loss": 0.5}}) + "\n")
    began = time.monotonic()
    facts = Logs().facts(path)
    assert time.monotonic() - began < 2.0
    assert (facts.begun["pid"], facts.last["step"], facts.loss) == (7, 8, 0.5)


def test_one_bad_run_is_one_bad_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a folder can do to the code that reads it, the others are shown."""
    from preftune.ui import app
    from preftune.ui.folders import Entry, find, overview

    for name in ("bad", "good"):
        make_run(tmp_path / name, num_steps=3)
    entries = list(find(tmp_path).values())

    def broken(entry: Entry) -> dict[str, Any]:
        if entry.label == "bad":
            raise TypeError("'<=' not supported between instances of 'str' and 'int'")
        return overview(entry)

    monkeypatch.setattr(app, "overview", broken)
    live = app.Live(tmp_path, "token")
    assert {one["label"]: one["status"] for one in live._overviews()} == {"bad": "unreadable", "good": "unknown"}

    def made(chosen: list[Entry]) -> list[str]:
        for entry in chosen:
            broken(entry)
        return [entry.label for entry in chosen]

    assert app._of_sound(made, entries) == ["good"]
    with pytest.raises(DataError, match="no page can show"):
        app._of_sound(made, [entry for entry in entries if entry.label == "bad"])
