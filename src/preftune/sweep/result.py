"""What a sweep leaves: ``sweep.json``, a YAML for the sweet spot, and weights only where they are wanted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from preftune.config import ModelConfig, ScriptConfig, redact
from preftune.config.fields import Field, fields_of_all
from preftune.config.paths import inside
from preftune.ownership import RunFolder, current, put_json
from preftune.sweep import runner
from preftune.sweep.board import SlotState
from preftune.sweep.choice import Candidate, Choice, choose
from preftune.sweep.plan import BASE_NAME, Plan, write_yaml
from preftune.sweep.runner import Outcome
from preftune.sweep.scores import LOWER_IS_BETTER, PAIRED, HeldOut, left_reference
from preftune.sweep.space import as_setting
from preftune.version import __version__

FILE_NAME, BEST_NAME = "sweep.json", "best.yaml"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def candidates_of(states: Sequence[SlotState], folder: Path, metric: str) -> list[Candidate]:
    """The complete trials with what they are compared by."""
    found = []
    for state in states:
        if state.outcome is None or state.outcome.state != runner.COMPLETE or state.outcome.same_as is not None:
            continue
        mean = state.outcome.metrics.get(metric, {}).get("mean")
        if mean is not None:
            run = inside(folder, state.outcome.run or "")
            held = HeldOut.load(run) if metric in PAIRED and run is not None else None
            left = left_reference(state.outcome.metrics)
            found.append(Candidate(state.slot, state.params, float(mean), held, left))
    return found


def summarise(plan: Plan, states: Sequence[SlotState], folder: Path) -> dict[str, Any]:
    """The content of ``sweep.json``.

    Args:
        plan: The sweep.
        states: The state of every trial.
        folder: The sweep's folder.

    Returns:
        A mapping for JSON; see ``docs/sweep.md``.
    """
    choice = choose(candidates_of(states, folder, plan.metric), plan.metric, plan.direction, plan.seed)
    outcomes = [state.outcome for state in states if state.outcome is not None]
    scored = sum(outcome.num_scored for outcome in outcomes)
    needed = max((outcome.num_scored + outcome.num_found for outcome in outcomes), default=0)
    return {
        "preftune": __version__,
        "method": plan.method,
        "verb": plan.verb,
        "search": plan.search,
        "params": {each.name: each.to_json() for each in plan.dimensions},
        "trials": [_trial(state, choice) for state in states],
        "best": _best(plan, states, choice, folder),
        # 1 means that the reference ran over the data once, for all trials together; 0 that it was known before.
        "reference_passes": round(scored / needed, 6) if needed else 0.0,
        "reference_pairs": scored,
        "metric": plan.metric,
        "direction": plan.direction,
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 3),
        "seed": plan.seed,
        "maps": _maps(plan, states, choice, folder),
        "storage": redact(plan.storage) if plan.storage else "journal file",
    }


def _trial(state: SlotState, choice: Choice | None) -> dict[str, Any]:
    outcome = state.outcome or Outcome(state.state)
    comparison = choice.comparisons.get(state.slot) if choice is not None else None
    return {
        "number": state.slot,
        "params": dict(state.params),
        "state": state.state,
        "reason": outcome.reason,
        "metrics": outcome.metrics,
        "seconds": round(outcome.seconds, 3),
        "run": outcome.run,
        "num_steps": outcome.num_steps,
        "reference_scored": outcome.num_scored,
        "reference_found": outcome.num_found,
        "same_as": outcome.same_as,
        "left_reference": choice is not None and state.slot in choice.left,
        "tied_with_best": comparison.tied if comparison is not None else False,
        "difference_to_best": comparison.difference if comparison is not None else None,
        "standard_error": comparison.standard_error if comparison is not None else None,
        "p_value": comparison.p_value if comparison is not None else None,
        "adjusted_p_value": comparison.adjusted_p if comparison is not None else None,
    }


def _best(plan: Plan, states: Sequence[SlotState], choice: Choice | None, folder: Path) -> dict[str, Any] | None:
    if choice is None:
        return None
    sweet = next(state for state in states if state.slot == choice.sweet_spot)
    assert sweet.outcome is not None
    return {
        "number": choice.sweet_spot,
        "params": dict(sweet.params),
        "config": BEST_NAME,
        "settings": redact(trial_settings(plan, sweet.params, folder / "best")),
        "run": sweet.outcome.run,
        "highest_mean": choice.best,
        "reason": choice.reason,
    }


def _maps(plan: Plan, states: Sequence[SlotState], choice: Choice | None, folder: Path) -> dict[str, Any]:
    """Per metric every cell with its interval, and whether it can be told from that metric's own best."""
    names = list(dict.fromkeys(name for s in states if s.outcome is not None for name in s.outcome.metrics))
    found: dict[str, Any] = {}
    for name in names:
        direction = "minimize" if name in LOWER_IS_BETTER else "maximize"
        own = choice if name == plan.metric else None
        if own is None and name in PAIRED:
            own = choose(candidates_of(states, folder, name), name, direction, plan.seed)
        cells = []
        for state in states:
            entry = (state.outcome.metrics if state.outcome is not None else {}).get(name)
            if entry is not None:
                told = own.comparisons.get(state.slot) if own is not None else None
                tied = told.tied if told is not None else None
                cells.append({"number": state.slot, "params": dict(state.params), **entry, "tied_with_best": tied})
        found[name] = {"direction": direction, "best": own.best if own is not None else None, "cells": cells}
    return found


def trial_settings(plan: Plan, params: Mapping[str, Any], output_dir: Path) -> dict[str, Any]:
    """The settings of one trial, for ``--config`` of its verb: run alone they give the same numbers."""
    from preftune.training.provenance import plain

    fields = _fields_of_verb(plan.verb)
    own = {name: plain(as_setting(value, fields[name])) for name, value in params.items()}
    return {**plan.base, **own, "output_dir": str(output_dir)}


@cache
def _fields_of_verb(verb: str) -> dict[str, Field]:
    from preftune import training

    return fields_of_all(
        {"script": ScriptConfig, "model": ModelConfig, "trainer": getattr(training, f"{verb.upper()}Config")}
    )


def write_result(plan: Plan, states: Sequence[SlotState], folder: Path) -> dict[str, Any]:
    """Write ``sweep.json``, and ``best.yaml`` where there is a best.

    Returns:
        The content of ``sweep.json``.
    """
    found = summarise(plan, states, folder)
    put_json(folder / FILE_NAME, found)
    if found["best"] is not None:
        best = found["best"]
        comment = f"Sweet spot of the sweep in {folder}\n{best['reason']}\npreftune {plan.verb} --config {BEST_NAME}"
        write_yaml(folder / BEST_NAME, trial_settings(plan, best["params"], folder / "best"), comment)
    return found


def drop_weights(plan: Plan, states: Sequence[SlotState], folder: Path, *, final: bool) -> None:
    """Remove the weights that ``keep`` does not want.

    While trials are still running, all those stay that are tied with the best so far, since any of them may turn out to
    be the sweet spot.

    Args:
        plan: The sweep.
        states: The state of every trial.
        folder: The sweep's folder.
        final: Whether all trials are done.
    """
    if plan.keep == "all":
        return
    choice = None
    if plan.keep == "best":
        choice = choose(candidates_of(states, folder, plan.metric), plan.metric, plan.direction, plan.seed)
    for state in states:
        if state.outcome is None or not state.outcome.run:
            continue
        told = choice.comparisons.get(state.slot) if choice is not None else None
        wanted = choice is not None and (
            state.slot == choice.sweet_spot if final else told is not None and told.tied is not False
        )
        # The study may have been written by somebody else: nothing is deleted outside of the sweep.
        run = inside(folder, state.outcome.run)
        if not wanted and run is not None:
            remove_weights(run)


def remove_weights(run: Path) -> None:
    """Remove weights and checkpoints that a trial has written; logs, settings, figures and others' files stay."""
    record = current(run)
    if record is None:
        return
    owned = RunFolder(run, record)
    # Another worker may be doing the same.
    for name in [*record.files]:
        if any(fnmatch(name, pattern) for pattern in _WEIGHTS):
            with suppress(FileNotFoundError):
                owned.remove_file(name)
    for name in [*record.folders]:
        with suppress(FileNotFoundError):
            owned.remove_folder(name)


def read_result(folder: Path) -> dict[str, Any] | None:
    """``sweep.json`` of a folder; ``None`` where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


__all__ = ["BASE_NAME", "candidates_of", "drop_weights", "read_result", "summarise", "trial_settings", "write_result"]
