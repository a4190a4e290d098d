"""The live log, and what the command line refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from preftune.cli.main import main
from preftune.training.progress_log import LiveLog
from preftune.ui.folders import status_of


def test_the_log_tells_beginning_lines_and_end(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state, log = TrainerState(max_steps=7), LiveLog()
    log.on_train_begin(args, state, TrainerControl())
    assert status_of(tmp_path) == "running"
    state.global_step = 3
    log.on_log(args, state, TrainerControl(), logs={"loss": float("nan"), "grad_norm": 2.0})
    log.on_log(args, state, TrainerControl(), logs={})
    log.on_train_end(args, state, TrainerControl())
    begin, line, end = (json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines())
    assert (begin["event"], begin["max_steps"], begin["pid"]) == ("begin", 7, os.getpid())
    assert (line["step"], line["logs"]) == (3, {"loss": "nan", "grad_norm": 2.0})
    assert (end["event"], end["step"]) == ("end", 3)
    assert begin["time"] <= line["time"] <= end["time"]
    assert status_of(tmp_path) == "finished"


def test_a_log_that_cannot_be_written_is_said_once_and_ends_no_run(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")
    (tmp_path / "out" / "log.jsonl").mkdir(parents=True)
    log = LiveLog()
    with pytest.warns(UserWarning, match=r"log\.jsonl cannot be written"):
        log.on_train_begin(args, TrainerState(), TrainerControl())
    log.on_log(args, TrainerState(), TrainerControl(), logs={"loss": 1.0})


def test_other_processes_of_a_run_write_nothing(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    LiveLog().on_train_begin(args, TrainerState(is_world_process_zero=False), TrainerControl())
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "words"), [(["/nowhere"], "no such folder"), ([".", "--port", "70000"], "not a port")]
)
def test_wrong_arguments_are_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
