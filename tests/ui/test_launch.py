"""Starting a run from the page: what may be asked for, and that it trains."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preftune.errors import ConfigError
from preftune.ui.launch import LOG, read_order, recorded_order
from tests.pipeline.conftest import made  # noqa: F401
from tests.ui.conftest import Server, start

GOOD = {"data": "pairs.jsonl", "model": "base", "name": "mine"}


def test_an_order_is_words_of_one_command(tmp_path: Path) -> None:
    order = read_order(
        tmp_path, {**GOOD, "data": " my pairs; rm -rf ~.jsonl ", "settings": {"beta": "0.2", "max_steps": ""}}
    )
    command = order.command("--dry_run")
    assert command[1:4] == ["-m", "preftune", "run"]
    assert command[4] == "my pairs; rm -rf ~.jsonl"
    assert command[-3:] == ["--beta", "0.2", "--dry_run"]
    assert order.folder == tmp_path.resolve() / "mine"


@pytest.mark.parametrize(
    "part",
    [
        {"name": "../up"},
        {"name": ".."},
        {"name": "a/b"},
        {"name": ".hidden"},
        {"name": "--out"},
        {"name": ""},
        {"name": "x" * 65},
        {"name": None},
        {"data": "--trust_remote_code"},
        {"data": ""},
        {"data": "a\nb"},
        {"data": "a\x00b"},
        {"data": ["pairs.jsonl"]},
        {"model": "-m"},
        {"model": "x" * 5000},
        {"settings": {"trust_remote_code": "true"}},
        {"settings": {"output_dir": "/tmp/x"}},
        {"settings": {"beta": "0.1 --trust_remote_code"}},
        {"settings": {"beta": "--push_to_hub"}},
        {"settings": {"beta": True}},
        {"settings": ["beta"]},
    ],
)
def test_what_is_no_order_is_refused(tmp_path: Path, part: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        read_order(tmp_path, {**GOOD, **part})


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    root = tmp_path / "root"
    root.mkdir()
    (root / "mine").symlink_to(tmp_path / "elsewhere")
    (root / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(ConfigError, match="something else has this name"):
            read_order(root, {**GOOD, "name": name})


@pytest.mark.parametrize("path", ["plan", "launch", "launched"])
def test_other_sites_can_start_nothing(server: Server, path: str) -> None:
    body = json.dumps({**GOOD, "name": "from-elsewhere"}).encode()
    for headers in (
        {"Origin": "http://evil.example", "Content_Type": "application/json"},
        {"Content_Type": "application/json"},
        {"Origin": f"http://127.0.0.1:{server.port}", "Content_Type": "text/plain"},
    ):
        assert server.request("POST", path, body, **headers)[0] in (403, 415)
    own = {"Origin": f"http://127.0.0.1:{server.port}", "Content_Type": "application/json"}
    assert server.request("POST", path, body, token="wrong", **own)[0] == 404
    assert server.request("POST", path, body, Host="evil.example", **own)[0] == 421
    assert server.request("GET", path)[0] == 405
    assert not (server.root / "from-elsewhere").exists()


@pytest.mark.parametrize("path", ["plan", "launch"])
def test_a_wrong_order_is_one_sentence(server: Server, path: str) -> None:
    status, said = server.post(path, {**GOOD, "name": "../../etc"})
    assert status == 409
    assert "not a name for a folder" in said["error"]
    assert server.post("launched", {"name": "never"})[0] == 409


@pytest.fixture
def own(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:  # noqa: F811
    """A server over an empty folder, in a folder with a model and rows."""
    for entry in made.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    process, server = start(tmp_path / "runs")
    yield server
    process.terminate()
    process.communicate(timeout=30)


@pytest.mark.slow
def test_a_run_is_planned_and_trained_from_the_page(own: Server) -> None:
    order = {**GOOD, "settings": {"max_steps": "3"}}
    status, said = own.post("plan", order)
    assert (status, said["code"]) == (200, 0), said
    assert "3 steps of" in said["text"]
    assert "memory" in said["text"]
    assert not (own.root / "mine").exists()
    status, said = own.post("launch", order)
    assert status == 200, said
    assert own.post("launch", order)[0] == 409
    deadline = time.monotonic() + 300
    while own.post("launched", {"name": "mine"})[1]["running"]:
        assert time.monotonic() < deadline
        time.sleep(1)
    said = own.post("launched", {"name": "mine"})[1]
    assert said["code"] == 0, said["text"]
    key = own.key("mine")
    assert (own.root / "mine" / "report.html").is_file()
    assert (own.root / "mine" / LOG).stat().st_mode & 0o077 == 0
    # What is done is judged, made a model that others load, and gone on with, which finds nothing left to do.
    for action, printed in (
        ("evaluate", "saved"),
        ("export", "To serve it"),
        ("resume", "going on in"),
    ):
        status, said = own.post("act", {"id": key, "action": action})
        assert status == 200, said
        followed = {"name": said["follow"]}
        while own.post("launched", followed)[1]["running"]:
            assert time.monotonic() < deadline
            time.sleep(1)
        said = own.post("launched", followed)[1]
        assert said["code"] == 0, said["text"]
        assert printed in said["text"]
    assert (own.root / "mine" / "export" / "model.safetensors").is_file()


WORDS = ["preftune", "run", "pairs.jsonl", "--model", "base", "--out", "{folder}", "--beta", "0.2"]


def recorded(folder: Path, words: Any) -> Path:
    folder.mkdir(exist_ok=True)
    filled = [word.format(folder=folder) if isinstance(word, str) else word for word in words]
    (folder / "run.json").write_text(json.dumps({"command": filled}), encoding="utf-8")
    return folder


def test_a_run_that_this_page_began_can_be_gone_on_with(tmp_path: Path) -> None:
    order = recorded_order(recorded(tmp_path / "mine", WORDS))
    assert order == read_order(tmp_path, {**GOOD, "settings": {"beta": "0.2"}})


@pytest.mark.parametrize(
    "words",
    [
        [*WORDS, "--trust_remote_code", "true"],
        [*WORDS, "--trust_remote_code"],
        [*WORDS[:-1], "0.2 --trust_remote_code"],
        [*WORDS[:6], "/tmp/elsewhere", *WORDS[7:]],
        [*WORDS[:6], "{folder}/../other", *WORDS[7:]],
        ["preftune", "dpo", *WORDS[2:]],
        ["preftune", "run", "--config", *WORDS[3:]],
        [*WORDS[:4], "-m", *WORDS[5:]],
        [*WORDS, "--out"],
        WORDS[:5],
        [],
        [1, 2, 3],
    ],
)
def test_a_record_that_asks_for_more_starts_nothing(words: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the command that it printed"):
        recorded_order(recorded(tmp_path / "mine", words))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"command": "preftune run"}', '{"command": null}', "{" * 5000])
def test_a_record_that_is_none_starts_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="the command that it printed"):
        recorded_order(tmp_path)
