"""Trackers (W&B, MLflow, Trackio, TensorBoard): one run there for each run here, and the trials of a sweep together."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftune.errors import SetupError, flat
from preftune.runs.mlflow import open_run
from preftune.sweep.locks import one_at_a_time


@contextmanager
def grouped(name: str, trackers: Sequence[str], folder: Path) -> Iterator[None]:
    """Runs of trackers that begin inside are one group, and end with the block, whatever happens in it.

    TensorBoard groups by folders and Trackio by its project, which are settings of a run. W&B takes the group and
    MLflow the experiment from the environment; what the user has set there is kept. Some trackers keep one run per
    process: a trial that fails must not leave it to the next one.

    Args:
        name: Name of the group.
        trackers: Names of the trackers in use.
        folder: Folder that all processes of the sweep share.

    Raises:
        SetupError: MLflow cannot be reached.
    """
    before = open_run()
    wanted = {"WANDB_RUN_GROUP": name, "MLFLOW_EXPERIMENT_NAME": name} if trackers else {}
    added = {variable: value for variable, value in wanted.items() if variable not in os.environ}
    os.environ.update(added)
    failed = True
    try:
        if "mlflow" in trackers:
            _make_experiment(folder)
        yield
        failed = False
    finally:
        for variable in added:
            os.environ.pop(variable, None)
        _close_runs(before, failed=failed)


def replay(
    callbacks: Sequence[TrainerCallback],
    args: TrainingArguments,
    model: Any,
    state: TrainerState,
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Tell trackers about a run that was trained together with others, as if it had been trained alone.

    Args:
        callbacks: Fresh callbacks of the trackers.
        args: Settings of the run.
        model: Model, for its configuration.
        state: State of the trainer at the end.
        history: Log lines of the run.
    """
    control = TrainerControl()
    for callback in callbacks:
        callback.on_train_begin(args, state, control, model=model)
        for line in history:
            logs = {key: value for key, value in line.items() if key not in ("step", "epoch")}
            if line.get("epoch") is not None:
                logs["epoch"] = line["epoch"]
            at = replace(state, global_step=line["step"], epoch=line.get("epoch") or 0.0)
            callback.on_log(args, at, control, model=model, logs=logs)
        callback.on_train_end(args, state, control, model=model)


def take_trackers(trainer: Any) -> list[type[TrainerCallback]]:
    """Take the trackers' callbacks away from a trainer that stands for several runs.

    Args:
        trainer: A ``transformers.Trainer``.

    Returns:
        Their classes.
    """
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    kinds: list[type[TrainerCallback]] = get_reporting_integration_callbacks(trainer.args.report_to)
    for kind in kinds:
        trainer.remove_callback(kind)
    return kinds


def _make_experiment(folder: Path) -> None:
    """Workers that make MLflow's tables at the same time fail: one goes first."""
    mlflow = importlib.import_module("mlflow")
    with one_at_a_time(folder / "trackers.lock"):
        try:
            mlflow.set_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])
        except Exception as error:
            raise SetupError(
                f"the tracker cannot be used ({flat(error)[:160]})",
                where="report_to",
                value="mlflow",
                remedy="check MLFLOW_TRACKING_URI, or leave mlflow out",
            ) from error


def _close_runs(before: str | None, *, failed: bool) -> None:
    run = open_run()
    if run is not None and run != before:
        sys.modules["mlflow"].end_run(status="FAILED" if failed else "FINISHED")
    wandb: Any = sys.modules.get("wandb")
    if getattr(wandb, "run", None) is not None:
        wandb.finish(exit_code=int(failed))
    trackio: Any = sys.modules.get("trackio")
    current = getattr(getattr(trackio, "context_vars", None), "current_run", None)
    if current is not None and current.get() is not None:
        trackio.finish()
