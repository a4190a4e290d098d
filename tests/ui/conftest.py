"""The real server in a process of its own, and requests byte by byte."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.report.folders import make_run, make_sweep, make_trl_run, write_json


@dataclass
class Server:
    """A running server.

    Attributes:
        root: Folder that it shows.
        port: Where it listens.
        token: First part of every address.
    """

    root: Path
    port: int
    token: str

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/{self.token}/"

    def request(
        self, method: str, path: str, body: bytes | None = None, token: str | None = None, **headers: str
    ) -> tuple[int, str, dict[str, str]]:
        """Status, text and headers of an answer; header names with underscores."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, f"/{self.token if token is None else token}/{path}", skip_host="Host" in named)
        for name, value in named.items():
            connection.putheader(name, value)
        if body is not None and "Content-Length" not in named and "Transfer-Encoding" not in named:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
        found = {name.lower(): value for name, value in answer.getheaders()}
        connection.close()
        return answer.status, text, found

    def get(self, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
        return self.request("GET", path, None, None, **headers)

    def post(self, path: str, content: Any, **headers: str) -> tuple[int, Any]:
        """A request as the page itself makes it."""
        own = {"Origin": f"http://127.0.0.1:{self.port}", "Content_Type": "application/json", **headers}
        status, text, _ = self.request("POST", path, json.dumps(content).encode(), None, **own)
        return status, json.loads(text)

    def key(self, label: str) -> str:
        """Name of a run in addresses."""
        entries = json.loads(self.get("list")[1])
        return str(next(entry["key"] for entry in entries if entry["label"] == label))


def start(root: Path) -> tuple[subprocess.Popen[str], Server]:
    """Start ``preftune ui`` and read the address that it prints."""
    command = [sys.executable, "-m", "preftune", "ui", str(root)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONWARNINGS": "default"}
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("open http://127.0.0.1:"), line
    _, _, place, token, _ = line.split("open ", 1)[1].split("/")
    return process, Server(root, int(place.partition(":")[2]), token)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server over runs, a sweep, and things that must not be shown."""
    folder = tmp_path_factory.mktemp("ui")
    root = folder / "root"
    make_run(root / "one")
    make_trl_run(root / "deep" / "trl", checkpoint=60)
    make_sweep(root / "sweep")
    outside = make_trl_run(folder / "outside")
    (root / "linked").symlink_to(outside)
    write_json(root / "sneaky" / "eval.json", {"metrics": {}})
    (root / "sneaky" / "trainer_state.json").symlink_to(outside / "trainer_state.json")
    process, made = start(root)
    with process:
        yield made
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``model`` (a two-layer Llama with its tokenizer) and ``pairs.jsonl`` (16 pairs)."""
    from tests.models.tiny import save_tiny_model, train_tokenizer

    folder = tmp_path_factory.mktemp("world")
    words = ("nice", "dull", "good", "bad", "very", "film", "plot", "slow")
    rows = [
        {
            "prompt": f"the {words[i % 8]} {words[i % 5]} was",
            "chosen": f" {words[i % 3]}",
            "rejected": f" {words[7 - i % 3]}",
        }
        for i in range(16)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_tiny_model(folder / "model", train_tokenizer([" ".join(words)], 300))
    return folder
