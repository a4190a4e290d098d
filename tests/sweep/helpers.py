"""A plan without a model, and runners that only note what they were given."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preftune.sweep import runner
from preftune.sweep.plan import Plan
from preftune.sweep.runner import Observer, Outcome, TrialSpec
from preftune.sweep.scores import ACCURACY, HeldOut
from preftune.sweep.space import Dimension, grid

DIMENSIONS = (Dimension("beta", (0.05, 0.1, 0.2)), Dimension("learning_rate", (1e-6, 1e-5, 1e-4)))


def make_plan(**changes: Any) -> Plan:
    """A 3x3 grid."""
    dimensions = changes.pop("dimensions", DIMENSIONS)
    cells = changes.pop("cells", None)
    cells = tuple(grid(dimensions)) if cells is None else tuple(cells)
    values: dict[str, Any] = {
        "verb": "dpo",
        "method": "sigmoid",
        "base": {"model_name_or_path": "model", "dataset_name": "pairs.jsonl"},
        "dimensions": dimensions,
        "search": "grid",
        "cells": cells,
        "num_trials": len(cells),
        "seed": 0,
        "metric": ACCURACY,
        "direction": "maximize",
    }
    return Plan(**{**values, **changes})


def complete(accuracy: float, **more: Any) -> Outcome:
    """A complete trial."""
    metrics = {ACCURACY: {"mean": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "n": 100}}
    return Outcome(runner.COMPLETE, metrics=metrics, seconds=1.0, **more)


def held(right: Sequence[bool], beta: float = 0.1, digest: str = "same") -> HeldOut:
    """Held-out pairs of one prompt each, ranked right or wrong."""
    gaps = np.where(right, 1.0, -1.0)
    return HeldOut(
        np.stack([gaps, np.zeros_like(gaps)], 1), np.ones((len(gaps), 2), int), np.arange(len(gaps)), beta, digest
    )


class Noting:
    """Appends a line per trial to a file, in one write, and takes a moment over it."""

    max_trials = 1

    def __init__(self, path: Path, seconds: float = 0.0) -> None:
        self.path, self.seconds = path, seconds

    def run(self, trials: Sequence[TrialSpec], observer: Observer) -> list[Outcome]:
        outcomes = []
        for trial in trials:
            observer.step(trial, 1, 2)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{trial.number} {os.getpid()} {time.time()}\n")
            time.sleep(self.seconds)
            outcomes.append(complete(0.5 + trial.number / 100))
        return outcomes

    def numbers(self) -> list[int]:
        """Trials in the order in which they were run."""
        if not self.path.exists():
            return []
        return [int(line.split()[0]) for line in self.path.read_text(encoding="utf-8").splitlines()]


def work_in(folder: str, storage: str | None, notes: str, seconds: float) -> None:
    """What a worker process does; a function of a module, so that it can be spawned."""
    from preftune.sweep.board import Board
    from preftune.sweep.worker import work

    plan = make_plan(storage=storage)
    work(Board(plan, Path(folder)), Noting(Path(notes), seconds), Path(folder))
