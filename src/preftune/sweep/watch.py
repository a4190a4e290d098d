"""A trial under way: progress, divergence, guards and pruning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftune.sweep import runner
from preftune.sweep.runner import Observer, TrialSpec

#: Log lines in a row that must look bad: one bad step, which the trainer skips, is no divergence.
_LINES = 2


class Watch(TrainerCallback):
    """Stops a trial that is of no use, and says why.

    A trial is stopped for one of three reasons. It *diverged*: on two log lines in a row the loss, the margin or the
    gradient norm is not finite, or the loss is ``diverge_factor`` times its first value (a rule of thumb, not a
    published one).
    A guard *stopped* it, which the trial's ``alarms.jsonl`` says. It was *pruned* by the held-out metric, if that was
    asked for.

    Args:
        trial: The trial.
        observer: Told about steps, asked about pruning.
        diverge_factor: See above.
        more: Held-out figures of the evaluation that has just ended, beside those that the trainer reports.

    Attributes:
        state: State that the trial ends in.
        reason: Why, in words.
    """

    def __init__(
        self,
        trial: TrialSpec,
        observer: Observer,
        diverge_factor: float,
        more: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.state, self.reason = runner.COMPLETE, ""
        self._trial, self._observer, self._factor, self._more = trial, observer, diverge_factor, more
        self._first: float | None = None
        self._num_bad = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell how far it is."""
        self._observer.step(self._trial, state.global_step, state.max_steps)
        if self.reason:
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look for divergence."""
        found = dict(logs or {})
        if not isinstance(found.get("loss"), (int, float)):
            return
        bad = self._what_is_wrong(found)
        self._num_bad = self._num_bad + 1 if bad else 0
        if self._num_bad >= _LINES:
            self._stop(control, runner.DIVERGED, f"{bad} at step {state.global_step}")

    def _what_is_wrong(self, logs: dict[str, Any]) -> str:
        for name in ("loss", "grad_norm", "rewards/margins"):
            value = logs.get(name)
            if isinstance(value, (int, float)) and not math.isfinite(value):
                return f"{name} is {value}"
        loss = abs(float(logs["loss"]))
        if self._first is None:
            self._first = loss
        if loss <= self._factor * max(self._first, 1e-6):
            return ""
        return f"the loss rose more than {self._factor:g}-fold, from {self._first:.4g} to {loss:.4g},"

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Ask whether to go on."""
        if state.global_step >= state.max_steps:
            return
        reason = self._observer.should_prune(self._trial, state.global_step, {**(metrics or {}), **self._more()})
        if reason:
            self._stop(control, runner.PRUNED, reason)

    def _stop(self, control: TrainerControl, state: str, reason: str) -> None:
        if not self.reason:
            self.state, self.reason = state, reason
        control.should_training_stop = True

    def look_at_alarms(self, folder: Path) -> None:
        """Find out whether a guard stopped the run."""
        for alarm in read_alarms(folder):
            if alarm.get("action") == "stop" and not self.reason:
                self.state = runner.STOPPED
                self.reason = f"guard {alarm.get('guard')}: {alarm.get('message')}"


def read_alarms(folder: Path) -> list[dict[str, Any]]:
    """Alarms of a run; a torn last line is left out."""
    try:
        lines = (folder / "alarms.jsonl").read_text(encoding="utf-8").split("\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            alarm = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(alarm, dict):
            found.append(alarm)
    return found
