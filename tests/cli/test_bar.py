"""The bar and the lines beside it, in the words that a terminal of 80 and of 120 columns shows."""

from __future__ import annotations

import io
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from preftune.cli.progress import ProgressReport, figures_of
from preftune.terminal.bar import Bar, fitting

LOGS = {
    "loss": 0.69312,
    "rewards/accuracies": 0.5625,
    "rewards/margins": 0.01234,
    "grad_norm": 1.234,
    "learning_rate": 4.9e-6,
}


def shown(bar: Bar, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=True, legacy_windows=False)
    with console.capture() as capture:
        console.print(bar)
    return capture.get()


def bar_of_a_run() -> Bar:
    bar = Bar("step", 12_500, 3_125)
    bar.left, bar.figures = "1 h 05 min", ["loss 0.6931", "accuracy 0.5625", "margin 0.01234"]
    return bar


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (40, "step 3,125/12,500  left 1 h 05 min"),
        (80, "step 3,125/12,500  ━━━╸            left 1 h 05 min  loss 0.6931  accuracy 0.5625"),
        (
            120,
            "step 3,125/12,500  ━━━━━━━━━╸                              left 1 h 05 min  loss 0.6931  "
            "accuracy 0.5625  margin 0.01234",
        ),
    ],
)
def test_step_total_time_and_loss_are_legible(width: int, expected: str) -> None:
    assert shown(bar_of_a_run(), width).rstrip() == expected


@pytest.mark.parametrize("width", [20, 60, 79, 80, 81, 100, 120, 200])
def test_a_bar_is_one_line_at_any_width(width: int) -> None:
    text = shown(bar_of_a_run(), width)
    assert text.count("\n") == 1
    if width >= 60:
        for part in ("step 3,125/12,500", "left 1 h 05 min", "loss 0.6931"):
            assert part in text


def test_figures_are_left_out_from_the_end() -> None:
    figures = figures_of(LOGS)
    assert fitting("step 1/2", figures, 0).endswith("lr 4.9e-06")
    assert fitting("step 1/2", figures, 40) == "step 1/2  loss 0.6931  accuracy 0.5625"
    assert fitting("step 1/2", figures, 5) == "step 1/2"


@pytest.mark.parametrize("part", ["", "eval_"])
def test_an_accuracy_of_ties_alone_is_not_shown(part: str) -> None:
    told = figures_of({f"{part}loss": 0.6931, f"{part}rewards/accuracies": 0.0, f"{part}rewards/margins": 0.0})
    assert not any("accuracy" in each for each in told)
    wrong = figures_of({f"{part}rewards/accuracies": 0.0, f"{part}rewards/margins": -0.1})
    assert any("accuracy 0" in each for each in wrong)


def run_of(console: Console) -> None:
    report = ProgressReport(console)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=40)
    arguments: Any = SimpleNamespace(disable_tqdm=False)
    control: Any = None
    report.on_train_begin(arguments, state, control)  # type: ignore[arg-type]
    time.sleep(0.02)
    state.global_step = 10
    report.on_step_end(arguments, state, control)  # type: ignore[arg-type]
    report.on_log(arguments, state, control, LOGS)  # type: ignore[arg-type]
    report.on_train_end(arguments, state, control)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [80, 120])
def test_in_a_terminal_a_log_line_fits_and_names_its_step(width: int) -> None:
    out = io.StringIO()
    run_of(Console(file=out, width=width, force_terminal=True, color_system=None))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n")
    line = next(line for line in plain.split("\n") if "accuracy 0.5625" in line)
    assert line.startswith("step 10/40  loss 0.6931")
    assert len(line) <= width


def test_without_a_terminal_a_line_has_every_figure() -> None:
    out = io.StringIO()
    run_of(Console(file=out, width=80))
    assert out.getvalue() == ("step 10/40  loss 0.6931  accuracy 0.5625  margin 0.01234  grad norm 1.234  lr 4.9e-06\n")
