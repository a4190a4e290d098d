"""Where a run meets its guards: evidence is handed over with every log line, before trackers see it."""

from __future__ import annotations

import warnings

import numpy as np

from preftune.training.guards.evidence import COLUMNS, HeldOut, Moments, Window
from preftune.training.guards.panel import Guards, find_guards
from preftune.training.guards.settings import check_guards, parse_guards
from preftune.training.run import Run


def make_guards(run: Run) -> Guards | None:
    """The guards that a run's settings ask for, or ``None``."""
    args = run.args
    actions = check_guards(args.guards, run.task.guards)
    actions = {name: action for name, action in actions.items() if action != "off"}
    if not actions:
        return None
    guards = Guards(dict(actions), str(args.output_dir))
    evaluates = run.eval_dataset is not None and str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
    guards.set_sources(heldout=evaluates, generations=args.generation_steps > 0)
    for name in parse_guards(args.guards)[1]:
        # One that somebody switched on by name and that will never see its evidence is no option that works.
        if lacking := guards.lacking.get(name):
            warnings.warn(f"guards.{name} has no effect: {lacking}", UserWarning, stacklevel=4)
    return guards


def watch_line(run: Run, logs: dict[str, float]) -> None:
    """Show the guards the evidence that belongs to a log line, and add what they say to the line."""
    guards = find_guards(run)
    if guards is None or not guards.active:
        return
    watch, processes, state = run.step.watch, run.step.processes, run.state
    step, epoch = state.global_step, float(state.epoch or 0.0)
    evidence: Window | HeldOut | None = None
    if "loss" in logs and "eval_loss" not in logs:
        moments, norms = watch.pop_window(processes.reduce)
        evidence = Window(step, epoch, moments, norms, dict(logs))
    elif watch.split and f"{watch.split}_loss" in logs:
        split = watch.split
        found = watch.pop_heldout(processes.gathered)
        watch.begin_heldout("")
        # Without pairs, as in supervised fine-tuning, there still is a log line to read.
        values, groups = (np.zeros((0, len(COLUMNS))), np.zeros(0, dtype=np.int64)) if found is None else found
        evidence = HeldOut(
            step=step,
            epoch=epoch,
            split=split,
            values=values,
            groups=groups,
            has_reference=run.task.reference is not None,
            train=Moments(),
            generation=None,
            logs=dict(logs),
        )
    if evidence is not None:
        logs.update(guards.observe(evidence, writes=run.is_world_process_zero()))
