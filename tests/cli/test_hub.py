"""Pushing, against a stand-in for the Hub on this machine that keeps what it is sent."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import SMALL_RUN, Cli

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "x" * 20
#: Text of a row that must not leave the machine.
SECRET_ROW = "nobody else reads this"


class Hub(ThreadingHTTPServer):
    """Answers what an upload asks, and keeps commits as ``(message, {path: content})``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.tokens: set[str | None] = set()
        #: Paths from here on are answered with a failure.
        self.fails_at = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.fails_at and self.server.fails_at in self.path:
            self._answer({"error": "no space is left for this account"}, 403)
        elif self.path == "/api/repos/create":
            self._answer({"url": f"{self.server.url}/me/film"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            self._keep([json.loads(line) for line in body.splitlines()])
        else:
            self._answer({"errors": [], "warnings": []})

    def _keep(self, lines: list[dict[str, Any]]) -> None:
        files = {v["path"]: base64.b64decode(v["content"]) for k, v in (line.values() for line in lines) if k == "file"}
        self.server.commits.append((lines[0]["value"]["summary"], files))
        url = f"{self.server.url}/me/film/commit/abc"
        self._answer({"commitUrl": url, "commitOid": "abc", "hookOutput": "", "pullRequestUrl": None})

    def _answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def push(hub: Hub, **options: Any) -> subprocess.CompletedProcess[str]:
    """A short run that pushes, in a process of its own: the Hub's address is read when its library is imported."""
    with Path("pairs.jsonl").open(encoding="utf-8") as file:
        rows = [*map(json.loads, file), {"prompt": SECRET_ROW, "chosen": None, "rejected": "x"}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = {**SMALL_RUN, "dataset_name": "rows.jsonl", "on_bad_rows": "skip", "use_cpu": True, **options}
    settings |= {"push_to_hub": True, "hub_model_id": "me/film", "hub_token": TOKEN, "output_dir": "out"}
    settings |= {"generation_steps": 2, "num_generations": 2, "generation_max_new_tokens": 4, "save_steps": 2}
    flags = [
        part
        for name, value in settings.items()
        for part in (f"--{name}", str(value).lower() if value is True else str(value))
    ]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "preftune", "dpo", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_result_is_pushed_and_the_data_stay(cli: Cli, hub: Hub) -> None:
    done = push(hub, hub_strategy="checkpoint", hub_always_push=True)
    assert done.returncode == 0, done.stderr
    message, files = hub.commits[-1]
    assert message == "End of training"
    assert files["model.safetensors"] == Path("out/model.safetensors").read_bytes()
    assert files["README.md"] == Path("out/README.md").read_bytes()
    assert {"config.json", "tokenizer.json", "provenance.json"} <= files.keys()
    # They exist, and hold rows of the data or texts made from them.
    assert SECRET_ROW in Path("out/quarantine.jsonl").read_text(encoding="utf-8")
    assert Path("out/samples.jsonl").exists()
    for _, pushed in hub.commits:
        assert not {"quarantine.jsonl", "samples.jsonl"} & pushed.keys()
        assert not any(name.startswith("checkpoint-") for name in pushed)
        for content in pushed.values():
            assert SECRET_ROW.encode() not in content
            assert TOKEN.encode() not in content
    assert hub.tokens == {f"Bearer {TOKEN}"}
    saved = next(pushed for said, pushed in hub.commits if said == "Training in progress, step 2, checkpoint")
    assert saved["last-checkpoint/optimizer.safetensors"] == Path("out/checkpoint-2/optimizer.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "says"), [("/repos/create", "the Hub refuses"), ("/commit/", "everything is in out")]
)
def test_a_hub_that_refuses_costs_no_result(cli: Cli, hub: Hub, place: str, says: str) -> None:
    hub.fails_at = place
    done = push(hub)
    assert done.returncode == 6
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    # What cannot be made is said before any work; what fails in the end leaves the result on disk.
    assert Path("out/model.safetensors").exists() == (place == "/commit/")
