"""The state of logs that others are writing, read on and never twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftune.ui.folders import find, overview
from preftune.ui.logs import Logs, States
from tests.report.folders import make_trl_run, write_json, write_lines


def line(step: int, **logs: Any) -> dict[str, Any]:
    return {"time": float(step), "step": step, "epoch": 0.1, "logs": logs}


BEGIN = {"event": "begin", "pid": 7, "max_steps": 9, "step": 0}
END = {"event": "end", "step": 9}


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_a_log_that_grows_is_read_on(tmp_path: Path) -> None:
    logs, path = Logs(), tmp_path / "log.jsonl"
    assert logs.facts(path).empty
    write_lines(path, [BEGIN, line(1, loss=0.7)])
    found = logs.facts(path)
    assert (found.begun["pid"], found.last["step"], found.loss, found.ended, found.empty) == (7, 1, 0.7, False, False)
    # A line that is being written is left for the next time.
    text = json.dumps(line(2, loss=0.6))
    append(path, text[:10])
    assert logs.facts(path).last["step"] == 1
    append(path, text[10:] + "\n" + json.dumps(line(2, eval_loss=0.5)) + "\n")
    found = logs.facts(path)
    assert (found.last["logs"], found.loss) == ({"eval_loss": 0.5}, 0.6)
    append(path, json.dumps(END) + "\n")
    assert logs.facts(path).ended
    # It goes on after all.
    append(path, json.dumps({**BEGIN, "pid": 8}) + "\n")
    found = logs.facts(path)
    assert (found.begun["pid"], found.ended, found.loss) == (8, False, 0.6)


@pytest.mark.parametrize("replacement", [[BEGIN], [{**BEGIN, "pid": 9}, *(line(k, loss=k) for k in range(1, 50))]])
def test_a_log_that_was_replaced_is_read_anew(replacement: list[dict[str, Any]], tmp_path: Path) -> None:
    logs, path = Logs(), tmp_path / "log.jsonl"
    write_lines(path, [BEGIN, line(1, loss=0.7), line(2, loss=0.6), END])
    assert logs.facts(path).ended
    write_lines(path, replacement)
    found = logs.facts(path)
    assert not found.ended
    assert found.begun == replacement[0]
    assert found.loss == (replacement[-1]["logs"]["loss"] if len(replacement) > 1 else None)


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "begin", "pid": 3}\n{"step": 1, "logs": {"loss": NaN}}\n\xff{]\n[1]\n{"logs": 3}\n')
    found = Logs().facts(path)
    assert (found.begun["pid"], found.loss, found.ended) == (3, None, False)
    assert found.last["step"] == 1


def test_blocks_end_within_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.ui.logs._BLOCK", 150)
    path = write_lines(tmp_path / "log.jsonl", [BEGIN, *(line(k, loss=k / 100) for k in range(1, 80)), END])
    found = Logs().facts(path)
    assert (found.last["step"], found.loss, found.ended, found.begun["pid"]) == (79, 0.79, True, 7)


def test_a_long_log_is_not_parsed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "log.jsonl", [BEGIN, *(line(k, loss=1.0) for k in range(20_000))])
    logs = Logs()
    logs.facts(path)
    parsed: list[Any] = []
    whole = json.loads

    def counted(text: Any) -> Any:
        parsed.append(text)
        return whole(text)

    monkeypatch.setattr("preftune.files.json.loads", counted)
    append(path, json.dumps(line(20_000, loss=0.5)) + "\n")
    assert logs.facts(path).loss == 0.5
    assert logs.facts(path).loss == 0.5
    assert len(parsed) <= 3


def test_links_that_lead_out_are_not_followed(tmp_path: Path) -> None:
    write_lines(tmp_path / "outside.jsonl", [BEGIN, line(1, loss=0.7)])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").symlink_to(tmp_path / "outside.jsonl")
    assert Logs().facts(tmp_path / "run" / "log.jsonl").empty


def test_runs_without_a_log_show_their_last_state(tmp_path: Path) -> None:
    folder = make_trl_run(tmp_path / "trl", checkpoint=40, num_steps=40)
    (shown,) = (overview(entry) for entry in find(tmp_path).values())
    state = json.loads((folder / "checkpoint-40" / "trainer_state.json").read_text(encoding="utf-8"))
    last = [entry for entry in state["log_history"] if "loss" in entry][-1]
    assert (shown["status"], shown["step"], shown["max_steps"]) == ("unknown", 40, 40)
    assert (shown["loss"], shown["accuracy"]) == (last["loss"], last["rewards/accuracies"])
    states = States()
    assert states.facts(folder).last["step"] == 40
    write_json(folder / "trainer_state.json", {"global_step": 60, "log_history": [{"loss": 0.25, "step": 60}]})
    assert (states.facts(folder).last["step"], states.facts(folder).loss) == (60, 0.25)
    write_json(folder / "trainer_state.json", [1])
    assert states.facts(folder).loss is None
