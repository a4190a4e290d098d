"""Samples from a server: a process of its own that holds the model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from preftune.errors import ConfigError, SetupError
from preftune.evaluation import evaluate
from preftune.evaluation.config import EvalConfig
from tests.evaluation.conftest import Server

SCRIPT = Path(__file__).with_name("completion_server.py")
Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start servers, each in a process of its own on the loopback interface."""
    running: list[subprocess.Popen[str]] = []

    def begin(**settings: Any) -> Server:
        number = len(running)
        file, log = tmp_path / f"server-{number}.json", tmp_path / f"server-{number}.log"
        file.write_text(json.dumps(settings), encoding="utf-8")
        running.append(
            subprocess.Popen([sys.executable, str(SCRIPT), str(file), str(log)], stdout=subprocess.PIPE, text=True)
        )
        out = running[-1].stdout
        assert out is not None
        return Server(f"http://127.0.0.1:{int(out.readline())}/v1", log)

    yield begin
    for process in running:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def settings(world: Path, out: Path, server: Server, **more: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "ref_model": str(world / "ref"), "out": str(out), "num_prompts": 4, "max_new_tokens": 6, "num_resamples": 200,
        "reference_store": False, "sampling_url": server.url, "sampling_model": "m",
    }  # fmt: skip
    return common | more


@pytest.mark.slow
def test_both_models_are_sampled_by_the_server(
    world: Path, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_KEY", "secret-key")
    server = start(models={"m": str(world / "policy"), "r": str(world / "ref")}, fails=[503])
    arguments = settings(world, tmp_path / "out", server, sampling_ref_model="r", sampling_key_env="SERVER_KEY")
    found = evaluate(str(world / "policy"), str(world / "pairs.jsonl"), **arguments)
    asked = server.requests()
    assert len(asked) == 9, "four texts each, and one of them again"
    assert {request["path"] for request in asked} == {"/v1/completions"}
    assert {request["auth"] for request in asked} == {"Bearer secret-key"}
    for request in asked:
        body = request["body"]
        assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (1.0, 1.0, 0, 0.0)
    assert len({request["body"]["seed"] for request in asked}) == 8
    drawn = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    texts = {record["text"] for record in drawn}
    assert len(found.samples) == 4
    for sample in found.samples:
        assert sample["completion"] in texts
        assert sample["reference_completion"] in texts
    # The server's own log-probs are those that the model gives its texts here.
    sums = sorted(sum(record["server_logps"]) for record in drawn)
    for sample in found.samples:
        assert min(abs(sample["logp"] - value) for value in sums) < 1e-3
    assert found.kl is not None
    assert any("drew the samples" in note for note in found.notes)
    assert not any("other weights" in note for note in found.notes)
    assert "secret-key" not in (tmp_path / "out" / "eval.json").read_text()
    again = evaluate(str(world / "policy"), str(world / "pairs.jsonl"), **arguments)
    assert len(server.requests()) == 9, "asked again"
    assert again.samples == found.samples


@pytest.mark.slow
def test_other_weights_behind_the_name_are_noticed(world: Path, tmp_path: Path, start: Start) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other: Any = AutoModelForCausalLM.from_pretrained(world / "policy")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(4.0)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(world / "policy").save_pretrained(tmp_path / "other")
    server = start(models={"m": str(tmp_path / "other")})
    found = evaluate(str(world / "policy"), str(world / "pairs.jsonl"), **settings(world, tmp_path / "out", server))
    assert any("seems to hold other weights" in note for note in found.notes)


def test_a_server_that_tells_no_tokens_has_its_text_encoded(world: Path, tmp_path: Path, start: Start) -> None:
    server = start(models={"m": str(world / "policy")}, tells=[])
    found = evaluate(str(world / "policy"), str(world / "pairs.jsonl"), **settings(world, tmp_path, server))
    assert any("encoded" in note for note in found.notes)
    assert found.kl is not None
    # The reference is sampled here.
    assert {request["body"]["model"] for request in server.requests()} == {"m"}


def test_an_unknown_model_is_one_line(world: Path, tmp_path: Path, start: Start) -> None:
    server = start(models={"m": str(world / "policy")})
    with pytest.raises(SetupError, match=r"sampling_url: the server refuses \(status 404"):
        evaluate(
            str(world / "policy"),
            str(world / "pairs.jsonl"),
            **settings(world, tmp_path, server, sampling_model="x"),
        )


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"sampling_model": "m"}, "sampling_model: has no effect without a server"),
        ({"sampling_ref_model": "m"}, "sampling_ref_model: has no effect without a server"),
        ({"sampling_url": "http://x/v1"}, "sampling_model: no model named"),
        ({"sampling_url": "x/v1", "sampling_model": "m"}, "sampling_url: not an address"),
        ({"sampling_url": "http://x/v1", "sampling_model": "m", "num_prompts": 0}, "num_prompts: there are no samples"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EvalConfig(**given)
    assert str(caught.value).startswith(what)
