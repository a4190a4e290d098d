"""What the command line adds to a training run: a progress bar, and a clean end on Ctrl-C."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftune.bars import take_bars
from preftune.cli.style import duration

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
    """A bar with the time that is left, and the last figures; plain lines where the output is no terminal.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
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
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left {task.fields[left]}"),
                TextColumn("[dim]{task.fields[figures]}"),
                console=self._console,
            )
            self._task = self._progress.add_task(
                "training", total=state.max_steps, completed=state.global_step, left="?", figures=""
            )
            self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=state.global_step, left=self._left(state))

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
        figures = "  ".join(f"{label} {_figure(logs[name])}" for name, label in _SHOWN if _is_number(logs.get(name)))
        if not figures:
            return
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, figures=figures)
        left = self._left(state)
        line = f"step {state.global_step}/{state.max_steps}  {figures}" + (f"  left {left}" if left != "0 s" else "")
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar down."""
        self.close()

    def close(self) -> None:
        """Take the bar down; also called when training ends with an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _left(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        if not done:
            return "?"
        return duration((time.monotonic() - self._started) / done * (state.max_steps - state.global_step))


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
