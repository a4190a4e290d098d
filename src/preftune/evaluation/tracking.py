"""Sends an evaluation's numbers to the trackers that the trainers report to, through the same integrations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from preftune.errors import ConfigError, SetupError

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments


def find(trackers: Sequence[str], folder: str | os.PathLike[str]) -> Trackers | None:
    """Look for trackers, so that a name or package that is missing shows before any work.

    Args:
        trackers: Names such as ``tensorboard``, ``trackio``, ``wandb``, or ``all``.
        folder: Where trackers that write files put them.

    Returns:
        The trackers; ``None`` where there is none.

    Raises:
        ConfigError: An unknown tracker.
        SetupError: A tracker is not installed.
    """
    names = [name for name in trackers if name != "none"]
    if not names:
        return None
    from transformers import TrainingArguments
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_reporting_integration_callbacks,
    )

    args = TrainingArguments(output_dir=os.fspath(folder), report_to=names, use_cpu=True)
    try:
        kinds = get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        allowed = ", ".join([*sorted(INTEGRATION_TO_CALLBACK), "all", "none"])
        raise ConfigError("unknown tracker", where="report_to", value=", ".join(names), allowed=allowed) from error
    callbacks = []
    for kind in kinds:
        with _foreseen(kind):
            callbacks.append(kind())
    return Trackers(args, tuple(callbacks))


@dataclass(frozen=True)
class Trackers:
    """Trackers that are ready to take numbers.

    Attributes:
        args: Settings that the integrations read.
        callbacks: The integrations.
    """

    args: TrainingArguments
    callbacks: tuple[TrainerCallback, ...]

    def report(self, numbers: Mapping[str, float]) -> None:
        """Log numbers as ``eval/...`` at step 0.

        Raises:
            SetupError: A tracker fails.
        """
        from transformers import TrainerControl, TrainerState

        state, control = TrainerState(is_world_process_zero=True, is_local_process_zero=True), TrainerControl()
        logs: dict[str, Any] = {f"eval_{name}": value for name, value in numbers.items()}
        for callback in self.callbacks:
            with _foreseen(type(callback)):
                callback.on_train_begin(self.args, state, control)
                try:
                    callback.on_log(self.args, state, control, logs=dict(logs))
                finally:
                    # What a tracker opened would go on writing behind our back.
                    callback.on_train_end(self.args, state, control)


@contextmanager
def _foreseen(kind: type[TrainerCallback]) -> Iterator[None]:
    try:
        yield
    except (ImportError, RuntimeError) as error:
        said = " ".join(str(error).split())[:160]
        raise SetupError(
            f"the tracker cannot be used ({said})",
            where="report_to",
            value=kind.__name__,
            remedy="run pip install 'preftune[trackers]', or leave report_to out",
        ) from error
