"""Models behind an OpenAI-compatible completions endpoint, for tests: ``python FILE SETTINGS.json LOG.jsonl``.

Settings: ``models``, folders by name; ``tells``, which of ``token_ids`` and ``logprobs`` its answers hold; ``fails``,
status codes of the first requests. Prints its port, then logs one line per request.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def complete(model: Any, tokenizer: Any, body: dict[str, Any], tells: list[str]) -> dict[str, Any]:
    """Draw one completion, a token at a time, without a cache."""
    ids, drawn, logps = list(body["prompt"]), [], []
    generator = torch.Generator().manual_seed(body["seed"])
    reason = "length"
    for _ in range(body["max_tokens"]):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        token = int(torch.multinomial((logits / body["temperature"]).softmax(-1), 1, generator=generator))
        ids.append(token)
        drawn.append(token)
        logps.append(float(logits[token]))
        if token == tokenizer.eos_token_id:
            reason = "stop"
            break
    choice: dict[str, Any] = {"text": tokenizer.decode(drawn, skip_special_tokens=True), "finish_reason": reason}
    if "token_ids" in tells:
        choice["token_ids"] = drawn
    if "logprobs" in tells:
        choice["logprobs"] = {"token_logprobs": logps}
    return choice


class Handler(BaseHTTPRequestHandler):
    """One request."""

    settings: dict[str, Any]
    models: dict[str, tuple[Any, Any]]
    log: Path
    lock = threading.Lock()

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"path": self.path, "auth": self.headers.get("Authorization"), "body": body}) + "\n"
                )
            status = self.settings["fails"].pop(0) if self.settings.get("fails") else 200
            if body["model"] not in self.models:
                status = 404
            if status == 200:
                tells = self.settings.get("tells", ["token_ids", "logprobs"])
                answer: dict[str, Any] = {"choices": [complete(*self.models[body["model"]], body, tells)]}
            else:
                answer = {"error": "no"}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    Handler.settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Handler.log = Path(sys.argv[2])
    Handler.models = {
        name: (AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
        for name, folder in Handler.settings["models"].items()
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
