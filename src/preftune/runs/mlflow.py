"""MLflow: one run there for each run here."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class OneMlflowRun(TrainerCallback):
    """What is logged after training, such as the last evaluation, goes where training was logged.

    transformers ends MLflow's run together with training. Every figure after that would go to a second run without name
    or settings, which MLflow opens by itself.
    """

    def __init__(self) -> None:
        self._run_id: str | None = None
        self._reopened = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the run; the integration, which stands before this callback, has just opened it."""
        self._run_id = open_run()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open it once more."""
        if self._run_id is not None and open_run() is None:
            sys.modules["mlflow"].start_run(run_id=self._run_id)
            self._reopened = True

    def close(self) -> None:
        """End the run, if it was opened here."""
        if self._reopened and open_run() == self._run_id:
            sys.modules["mlflow"].end_run()
        self._reopened = False


def open_run() -> str | None:
    """MLflow's open run, without importing it where nobody else has."""
    active = getattr(sys.modules.get("mlflow"), "active_run", None)
    run = active() if callable(active) else None
    return None if run is None else str(run.info.run_id)
