"""Runs that go on, die, vanish; a real training run that is saved and stopped from the page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from preftune.config.machine import machine_id
from preftune.errors import TrainingError
from preftune.ui import control
from preftune.ui.folders import find, overview, signature, status_of
from tests.report.folders import make_run, make_sweep, write_lines
from tests.ui.conftest import Server


def begin(process: psutil.Process, **other: Any) -> dict[str, Any]:
    facts = {"pid": process.pid, "started": process.create_time(), "machine": machine_id()}
    return {"event": "begin", "time": time.time(), "step": 0, "max_steps": 9, **facts, **other}


@pytest.fixture
def sleeper() -> Any:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def test_a_run_is_running_only_while_its_very_process_lives(tmp_path: Path, sleeper: psutil.Process) -> None:
    assert status_of(tmp_path) == "unknown"
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "eval.json").write_text("{}", encoding="utf-8")
    assert status_of(tmp_path / "compared") == "evaluation"
    (tmp_path / "compared" / "trainer_state.json").write_text("{}", encoding="utf-8")
    assert status_of(tmp_path / "compared") == "unknown"
    for events, expected in (
        ([begin(sleeper)], "running"),
        ([begin(sleeper), {"event": "end", "time": 1.0, "step": 9}], "finished"),
        # The same number, but another process; another machine; numbers that are no process to be signalled.
        ([begin(sleeper, started=sleeper.create_time() - 60)], "stopped"),
        ([begin(sleeper, machine="elsewhere")], "stopped"),
        ([begin(sleeper, pid=1)], "stopped"),
        ([begin(sleeper, pid=-1)], "stopped"),
        ([begin(sleeper, pid=0)], "stopped"),
        ([begin(sleeper, pid=True)], "stopped"),
        ([begin(sleeper, pid="1; kill")], "stopped"),
        ([begin(sleeper, pid=2**80)], "stopped"),
        ([{"event": "begin"}], "stopped"),
    ):
        write_lines(tmp_path / "log.jsonl", events)
        assert status_of(tmp_path) == expected


def test_a_process_that_is_not_the_runs_is_never_signalled(tmp_path: Path, sleeper: psutil.Process) -> None:
    write_lines(tmp_path / "log.jsonl", [begin(sleeper, started=1.0)])
    for action in (control.stop, control.save):
        with pytest.raises(Exception, match="no process of this run is alive"):
            action(tmp_path)
    assert sleeper.is_running()
    assert not (tmp_path / "SAVE").exists()
    # A log that names any process of this user's, correctly: whoever it is, it is asked by a file and not signalled.
    write_lines(tmp_path / "log.jsonl", [begin(sleeper)])
    assert "checkpoint" in control.save(tmp_path)
    assert (tmp_path / "SAVE").exists()
    with pytest.raises(TrainingError, match="did not say how"):
        control.stop(tmp_path)
    for token in ("../" + "a" * 29, "A" * 32, "a" * 31, ["a" * 32], "a" * 32 + "\n"):
        write_lines(tmp_path / "log.jsonl", [begin(sleeper, token=token)])
        with pytest.raises(TrainingError, match="did not say how"):
            control.stop(tmp_path)
    write_lines(tmp_path / "log.jsonl", [begin(sleeper, token="a" * 32)])
    assert "asked to stop" in control.stop(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".stop-" + "a" * 32, "SAVE", "log.jsonl"]
    time.sleep(0.5)
    assert sleeper.is_running()
    assert sleeper.status() != psutil.STATUS_ZOMBIE


def test_files_that_ask_a_run_are_made_here_or_nowhere(tmp_path: Path, sleeper: psutil.Process) -> None:
    run = tmp_path / "run"
    write_lines(run / "log.jsonl", [begin(sleeper, token="b" * 32)])
    for name in ("SAVE", ".stop-" + "b" * 32):
        (run / name).symlink_to(tmp_path / "elsewhere")
    for action in (control.save, control.stop):
        with pytest.raises(TrainingError, match="cannot be written"):
            action(run)
    assert not (tmp_path / "elsewhere").exists()


def test_folders_are_found_without_checkpoints_and_links(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "run")
    (tmp_path / "a" / "run" / "checkpoint-5").mkdir()
    make_sweep(tmp_path / "sweep")
    make_run(tmp_path / ".hidden" / "run")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = {entry.label: entry for entry in find(tmp_path).values()}
    assert {"a/run", "sweep", "sweep/trials/000"} <= set(found)
    assert not [label for label in found if "checkpoint" in label or "hidden" in label or "loop" in label]
    assert overview(found["sweep"])["trials"] == 9


def test_news_are_noticed_and_a_vanished_folder_is_no_error(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    entry = next(iter(find(tmp_path).values()))
    before = signature(entry)
    assert signature(entry) == before
    with (tmp_path / "run" / "alarms.jsonl").open("a") as file:
        file.write('{"step": 1}\n')
    assert signature(entry) != before
    shutil.rmtree(tmp_path / "run")
    assert signature(entry) == "gone"
    assert overview(entry)["status"] == "unknown"


def now(server: Server, path: str) -> str:
    status, text, _ = server.get(path)
    assert status == 200
    return str(json.loads(text)["now"])


def test_open_pages_are_told_and_outlive_a_folder(server: Server) -> None:
    folder = make_run(server.root / "brief", num_steps=5)
    key = server.key("brief")
    path = f"changes?id={key}"
    # A new folder is found within an interval.
    end = time.monotonic() + 30
    while now(server, path) == "gone":
        assert time.monotonic() < end
        time.sleep(0.1)
    first, everything = now(server, path), now(server, "changes")
    assert now(server, path) == first
    write_lines(folder / "samples.jsonl", [])
    assert now(server, path) != first
    assert now(server, "changes") != everything
    shutil.rmtree(folder)
    assert now(server, path) == "gone"
    for path in (f"view?id={key}", f"news?id={key}"):
        assert server.get(path)[0] == 404
    # Together with one that is still there, the rest is shown.
    assert server.get(f"view?id={key}&id={server.key('one')}")[0] == 200


def test_news_are_what_the_page_takes(server: Server) -> None:
    status, text, _ = server.get(f"news?id={server.key('one')}&id={server.key('sweep')}")
    news = json.loads(text)
    assert status == 200
    assert set(news) == {"data", "summary", "sections", "status"}
    assert news["data"]["runs"][0]["name"] == "one"
    assert '<section id="summary"' in news["summary"]


@pytest.mark.parametrize(
    "request_",
    [{}, {"prompt": ""}, {"prompt": 3}, {"prompt": "a", "max_new_tokens": 0}, {"prompt": "a", "temperature": -1}],
)
def test_prompts_are_checked(server: Server, request_: dict[str, Any]) -> None:
    status, said = server.post("prompt", {"id": server.key("one"), **request_})
    assert status == 409
    assert set(said) == {"error"}


def test_a_run_without_weights_says_so(server: Server) -> None:
    status, said = server.post("prompt", {"id": server.key("one"), "prompt": "Hello"})
    assert (status, "holds no weights" in said["error"]) == (409, True)


@pytest.mark.slow
def test_a_real_run_is_followed_saved_stopped_read_and_tried(server: Server, world: Path) -> None:
    """One training run from the command line, with everything that the page can do to it."""
    folder = server.root / "real"
    command = [sys.executable, "-m", "preftune", "dpo", "--model_name_or_path", str(world / "model")]
    command += ["--dataset_name", str(world / "pairs.jsonl"), "--output_dir", str(folder), "--max_steps", "100000"]
    command += ["--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ) as process:
        wait_for(lambda: (folder / "log.jsonl").is_file() and status_of(folder) == "running", process)
        key = server.key("real")
        first = json.loads(server.get(f"news?id={key}")[1])["status"][0]["step"] or 0
        wait_for(lambda: (json.loads(server.get(f"news?id={key}")[1])["status"][0]["step"] or 0) > first, process)
        assert server.post("act", {"id": key, "action": "save"})[0] == 200
        wait_for(lambda: any(folder.glob("checkpoint-*/trainer_state.json")), process)
        assert server.post("act", {"id": key, "action": "stop"})[0] == 200
        assert process.wait(timeout=120) == 130
    assert status_of(folder) in ("finished", "stopped")
    assert server.post("act", {"id": key, "action": "stop"})[0] == 409


@pytest.mark.slow
def test_a_finished_run_answers_prompts_and_shows_its_data(server: Server, world: Path) -> None:
    folder = server.root / "finished"
    command = [sys.executable, "-m", "preftune", "dpo", "--model_name_or_path", str(world / "model")]
    command += ["--dataset_name", str(world / "pairs.jsonl"), "--output_dir", str(folder), "--max_steps", "3"]
    command += ["--logging_steps", "1", "--report_to", "none", "--learning_rate", "0.5"]
    subprocess.run(command, check=True, capture_output=True)
    key = server.key("finished")
    ask = {"id": key, "prompt": "the film was", "max_new_tokens": 8, "seed": 3}
    status, said = server.post("prompt", ask)
    assert status == 200
    assert [answer["label"] for answer in said["answers"]] == ["before", "after"]
    assert said["answers"][0]["text"] != said["answers"][1]["text"]
    assert server.post("prompt", ask)[1] == said
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    page = json.loads(server.get(f"data?id={key}&start=2")[1])
    assert (page["total"], page["rows"][0]["index"]) == (16, 2)
    for side in page["rows"][0]["sides"]:
        by_label = {run["label"]: run["text"] for run in side["runs"]}
        assert by_label["prompt"] == rows[2]["prompt"]
        assert by_label[side["name"]] == rows[2][side["name"]] + "<eos>"


def wait_for(condition: Any, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.2)
