"""Progress lines and the clean stop."""

from __future__ import annotations

import io
import os
import signal

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from preftune.cli.progress import ProgressReport
from preftune.runs.stopping import StopOnSignal


@pytest.fixture
def args(tmp_path: object) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=False)


def state(step: int) -> TrainerState:
    return TrainerState(global_step=step, max_steps=10, is_world_process_zero=True)


@pytest.mark.parametrize("terminal", [True, False])
def test_log_lines(args: TrainingArguments, terminal: bool) -> None:
    out = io.StringIO()
    report = ProgressReport(Console(file=out, force_terminal=terminal, width=160, legacy_windows=False))
    control = TrainerControl()
    report.on_train_begin(args, state(0), control)
    report.on_step_end(args, state(5), control)
    report.on_log(args, state(5), control, logs={"loss": 0.6931, "rewards/accuracies": 0.5, "learning_rate": 5e-7})
    report.on_log(args, state(5), control, logs={"epoch": 1.0})
    report.on_train_end(args, state(10), control)
    shown = out.getvalue()
    assert "step 5/10  loss 0.6931  accuracy 0.5  lr 5e-07" in shown
    assert shown.count("step 5/10") == 1
    assert ("training" in shown) is terminal


def test_silent_where_asked(args: TrainingArguments) -> None:
    out = io.StringIO()
    report = ProgressReport(Console(file=out))
    args.disable_tqdm = True
    report.on_train_begin(args, state(0), TrainerControl())
    report.on_log(args, state(5), TrainerControl(), logs={"loss": 1.0})
    assert out.getvalue() == ""


def test_first_signal_stops_after_the_step_second_at_once(args: TrainingArguments) -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    stop, control = StopOnSignal(said.append), TrainerControl()
    stop.on_train_begin(args, state(0), control)
    try:
        stop.on_step_end(args, state(1), control)
        before_signal = control.should_training_stop
        os.kill(os.getpid(), signal.SIGINT)
        stop.on_step_end(args, state(2), control)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.on_train_end(args, state(2), control)
    assert before_signal is False
    assert (control.should_save, control.should_training_stop, stop.stopped_at) == (True, True, 2)
    assert len(said) == 1
    assert signal.getsignal(signal.SIGINT) is before
