"""What a sweep shows while it runs and when it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from preftune.sweep import runner
from preftune.sweep.board import Board
from preftune.sweep.plan import Plan
from preftune.sweep.runner import Outcome, TrialSpec
from preftune.sweep.scores import ACCURACY, PER_TOKEN, left_reference
from preftune.sweep.space import shown
from preftune.sweep.worker import Reporter
from preftune.terminal.bar import Bar, live
from preftune.terminal.units import duration


def cell_text(entry: Mapping[str, Any] | None) -> str:
    """A figure with its interval: ``0.612 [0.55, 0.67]``."""
    if not entry or entry.get("mean") is None:
        return "-"
    text = f"{entry['mean']:.4g}"
    return text if entry.get("low") is None else f"{text} [{entry['low']:.3g}, {entry['high']:.3g}]"


class View(Reporter):
    """Bars and lines of a sweep: a bar over trials and one over steps, plain lines where the output is no terminal.

    Args:
        plan: The sweep.
        console: Where to print.
        num_done: Trials that were done before.
        num_workers: Workers that share what is left.
    """

    def __init__(self, plan: Plan, console: Console, num_done: int, num_workers: int = 1) -> None:
        self._plan, self._console, self._workers = plan, console, num_workers
        self._done, self._told = num_done, set[int]()
        self._begun = time.monotonic()
        self._trial_begun = self._begun
        self._share, self._run_here = 0.0, 0
        self._trials = Bar("trials", plan.num_trials, num_done)
        self._steps = Bar("steps", None)
        self._live = live(console, self._trials, self._steps) if console.is_terminal else None

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _left(self) -> str:
        """Time that is left, from the trials run since this call began; empty where it is not known."""
        work = self._run_here + self._share
        if work < 0.05:
            return ""
        remaining = max(self._plan.num_trials - self._done - self._share, 0.0)
        return duration((time.monotonic() - self._begun) / work * remaining)

    def started(self, trial: TrialSpec) -> None:
        """Show which trial it is."""
        self._trial_begun, self._share = time.monotonic(), 0.0
        self._steps.title, self._steps.done, self._steps.total = f"trial {trial.number}, step", 0, None
        self._steps.figures = [shown(trial.params)]

    def step(self, trial: TrialSpec, step: int, num_steps: int) -> None:
        """Move the bars."""
        self._share = step / num_steps if num_steps else 0.0
        self._steps.done, self._steps.total = step, num_steps
        self._trials.left = self._left()

    def finished(self, trial: TrialSpec, outcome: Outcome) -> None:
        """Tell the outcome."""
        self._share = 0.0
        if trial.number in self._told:
            return
        self._told.add(trial.number)
        self._done, self._run_here = self._done + 1, self._run_here + 1
        self._trials.done, self._trials.left = self._done, self._left()
        self._line(trial.number, trial.params, outcome)

    def _line(self, number: int, params: Mapping[str, Any], outcome: Outcome) -> None:
        text = f"{self._done}/{self._plan.num_trials}  trial {number}: {shown(params)}  "
        if outcome.same_as is not None:
            text += f"as trial {outcome.same_as}  "
        if outcome.state == runner.COMPLETE:
            metrics = outcome.metrics
            for label, name in _columns(self._plan.metric).items():
                text += f"{label} {cell_text(metrics.get(name))}  "
            text += "left what the reference writes  " if left_reference(metrics) else ""
        else:
            text += f"{outcome.state}: {outcome.reason}  "
        left = self._left()
        text += duration(outcome.seconds) + (f"  left {left}" if left and self._done < self._plan.num_trials else "")
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line."""
        self._console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def waiting(self, board: Board) -> None:
        """Show what other workers have done, and how far they are."""
        running = 0.0
        for state in board.states():
            if state.outcome is not None and state.slot not in self._told and state.outcome.run:
                self._told.add(state.slot)
                self._done += 1
                self._run_here += 1
                self._line(state.slot, state.params, state.outcome)
            elif state.beat and state.beat.get("num_steps"):
                running += state.beat["step"] / state.beat["num_steps"]
        self._share = running
        self._trials.done, self._trials.left = self._done, self._left()

    def already(self, board: Board) -> None:
        """Leave out what was done before this call."""
        self._told |= {state.slot for state in board.states() if state.outcome is not None}


def _columns(metric: str) -> dict[str, str]:
    """Figures to show, by their headings: the deciding one first."""
    shown = {PER_TOKEN: "margin per token", ACCURACY: "accuracy"}
    heading = shown.get(metric, metric.removeprefix("eval_").replace("_", " "))
    return {heading: metric, "accuracy": ACCURACY, "train loss": "train_loss"}


def table(result: Mapping[str, Any]) -> Table:
    """All trials with their figures; those that cannot be told from the best are marked as tied with it."""
    best = result["best"] or {}
    heading = next(iter(_columns(result["metric"])))
    grid = Table(
        title=f"{result['method']}: {heading} on held-out pairs",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    metric = result["metric"]
    columns = _columns(metric)
    # In a terminal of 80 columns two names stay whole, and the figures break between value and interval.
    whole = result["params"] if len(result["params"]) < 3 else ()
    for name in ("trial", *result["params"], *columns, ""):
        justify: Literal["left", "right"] = "right" if name else "left"
        texts = [cell_text(trial["metrics"].get(columns[name])) for trial in result["trials"] if name in columns]
        numbers = [len(number) for text in texts for number in text.split()]
        whole_numbers = max(numbers, default=None) if name else len("sweet spot")
        grid.add_column(name, justify=justify, overflow="fold", no_wrap=name in whole, min_width=whole_numbers)
    for trial in result["trials"]:
        metrics = trial["metrics"]
        state = trial["state"]
        if trial["number"] == best.get("number"):
            state = "sweet spot"
        elif trial["number"] == best.get("highest_mean"):
            state = "highest mean"
        elif trial["left_reference"]:
            state = "left the reference"
        elif trial["tied_with_best"]:
            state = "tied with the best"
        # Text, not markup: values come from the user.
        params = (Text(f"{trial['params'].get(name)}") for name in result["params"])
        figures = (Text(cell_text(metrics.get(name))) for name in columns.values())
        style = "bold green" if state == "sweet spot" else None
        grid.add_row(str(trial["number"]), *params, *figures, state, style=style)
    return grid


def summary(plan: Plan, num_done: int, notes: tuple[str, ...] = ()) -> Table:
    """What is going to be done."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(
        "sweep", Text(f"{plan.num_trials} trials of preftune {plan.verb} ({plan.method}), {plan.search} search")
    )
    for each in plan.dimensions:
        scale = " (log)" if each.log else ""
        span = f"{each.low:g} to {each.high:g}{scale}" if each.is_range else ", ".join(map(str, each.values))
        grid.add_row(each.name, Text(span))
    grid.add_row("decides", Text(f"{plan.metric}, {plan.direction}d"))
    if num_done:
        grid.add_row("done", Text(f"{num_done} trials are done and are not repeated"))
    for note in notes:
        grid.add_row("note", Text(note, style="yellow"))
    return grid
