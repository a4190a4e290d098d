"""What the command line adds to a training run: a progress bar, and a clean end on Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftune.bars import take_bars
from preftune.terminal.bar import Bar, fitting, live
from preftune.terminal.units import duration

_SHOWN = (
    ("loss", "loss"),
    ("eval_loss", "eval loss"),
    ("rewards/accuracies", "accuracy"),
    ("eval_rewards/accuracies", "eval accuracy"),
    ("rewards/margins", "margin"),
    ("eval_rewards/margins", "eval margin"),
    ("mean_token_accuracy", "token accuracy"),
    ("grad_norm", "grad norm"),
    ("learning_rate", "lr"),
)


class ProgressReport(TrainerCallback):
    """A bar with the time that is left, and a line of figures for each log; lines alone where there is no terminal.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Bar | None = None
        self._live: Live | None = None
        self._started = 0.0
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the bar."""
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        self._started, self._first_step = time.monotonic(), state.global_step
        if self._console.is_terminal:
            self._bar = Bar("training", state.max_steps, state.global_step)
            self._live = live(self._console, self._bar)
            self._live.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock again: what comes before the first step would spoil the pace."""
        if state.global_step == self._first_step:
            self._started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.done, self._bar.left = state.global_step, self._left(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the figures of a log line."""
        if not state.is_world_process_zero or args.disable_tqdm or not logs:
            return
        figures = figures_of(logs)
        if not figures:
            return
        if self._bar is not None:
            # The line above tells the rest, with the step that it belongs to.
            self._bar.figures = figures[:1]
        head = f"step {state.global_step}/{state.max_steps}"
        left = self._left(state)
        if left not in ("0 s", "?"):
            head += f"  left {left}"
        line = fitting(head, figures, self._console.width if self._console.is_terminal else 0)
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar down."""
        self.close()

    def close(self) -> None:
        """Take the bar down; also called when training ends with an error."""
        if self._live is not None:
            self._live.stop()
        self._live = self._bar = None

    def _left(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        if not done:
            return "?"
        return duration((time.monotonic() - self._started) / done * (state.max_steps - state.global_step))


def figures_of(logs: Mapping[str, Any]) -> list[str]:
    """Figures of a log line in words, the most important first.

    Before the first step every pair is a tie, which counts as wrong: such an accuracy says nothing and is left out.
    """
    ties = {f"{part}rewards/accuracies" for part in ("", "eval_") if _all_ties(logs, part)}
    return [
        f"{label} {_figure(logs[name])}" for name, label in _SHOWN if _is_number(logs.get(name)) and name not in ties
    ]


def _all_ties(logs: Mapping[str, Any], part: str) -> bool:
    return logs.get(f"{part}rewards/accuracies") == 0 == logs.get(f"{part}rewards/margins")


def replace_progress(trainer: Any, console: Console) -> ProgressReport:
    """Put our progress report in the place of the library's own.

    Args:
        trainer: A ``transformers.Trainer``.
        console: Where to print.

    Returns:
        The callback, for closing it after an error.
    """
    take_bars(trainer)
    report = ProgressReport(console)
    trainer.add_callback(report)
    return report


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _figure(value: float) -> str:
    return f"{value:.3g}" if value and abs(value) < 1e-3 else f"{value:.4g}"
