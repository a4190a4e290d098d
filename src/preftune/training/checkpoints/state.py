"""State of optimizer, scheduler, scaler, callbacks and of the running sums, to and from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerControl

from preftune.training.checkpoints import rng
from preftune.training.checkpoints.trees import has_tree, load_tree, save_tree

if TYPE_CHECKING:
    from preftune.training.checkpoints.saved import SavedTrainer


def load_optimizer(optimizer: Any, folder: Path) -> None:
    """Put an optimizer's state back, in the precision it was saved in.

    torch casts floating-point state to its parameter's type, which would round what optimizers keep in fp32 for
    half-precision weights.
    """
    state = load_tree(folder, "optimizer")
    optimizer.load_state_dict(state)
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = [p for group in getattr(inner, "param_groups", []) for p in group["params"]]
    for number, entries in state.get("state", {}).items():
        if not isinstance(number, int) or number >= len(parameters):
            return
        held = inner.state.get(parameters[number], {})
        for name, value in entries.items() if isinstance(entries, dict) else ():
            mine = held.get(name)
            if isinstance(value, Tensor) and isinstance(mine, Tensor) and mine.dtype != value.dtype:
                held[name] = value.to(mine.device)


def progress(trainer: SavedTrainer) -> dict[str, Any]:
    """This process's share of what the loop holds between two log lines, and its random state."""
    return {
        "random": rng.capture(trainer.args.device),
        "loss": trainer._tr_loss,
        "process": trainer.process_state(),
        "flos": trainer.current_flos,
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        # transformers 5.17 does not have it, and does not need it.
        "first_step": getattr(trainer, "_initial_global_step", 0),
        "seconds": trainer.seconds_trained(),
        "skipped": trainer.num_skipped_in_a_row,
        "max_tokens_per_row": trainer.max_tokens_per_row,
        "checkpoint_above": trainer.checkpoint_above,
    }


def restore_progress(trainer: SavedTrainer, state: dict[str, Any]) -> None:
    """Put back what :func:`progress` returned, but for the random state, whose moment comes with the first batch."""
    trainer._tr_loss = state["loss"].to(trainer.args.device)
    trainer.load_process_state(state["process"])
    trainer.current_flos = state["flos"]
    trainer._total_loss_scalar = state["total_loss"]
    trainer._globalstep_last_logged = state["last_logged"]
    trainer._initial_global_step = state["first_step"]
    trainer.seconds_before = state["seconds"]
    trainer.num_skipped_in_a_row = state["skipped"]
    if trainer.args.max_tokens_per_row is None:
        # Derived from the memory that was free then: another row length would change the last digits.
        trainer.max_tokens_per_row = state["max_tokens_per_row"]
    trainer.checkpoint_above = state["checkpoint_above"]


def callback_states(trainer: SavedTrainer) -> dict[str, Any]:
    """``{class name: [state, ...]}`` of every callback that has any."""
    found: dict[str, Any] = {}
    for callback in (*trainer.callback_handler.callbacks, trainer.control):
        if isinstance(callback, ExportableState):
            found.setdefault(type(callback).__name__, []).append(callback.state())
    return {name: states[0] if len(states) == 1 else states for name, states in found.items()}


def restore_callbacks(trainer: SavedTrainer) -> None:
    """Put the callbacks' attributes back, into the callbacks that are there.

    Making new ones out of saved arguments, as transformers does on request, loses whatever they hold that is not an
    argument, and would overrule arguments that were changed on purpose.
    """
    kept: Any = trainer.state.stateful_callbacks or {}
    for name, states in kept.items():
        mine = [
            callback
            for callback in trainer.callback_handler.callbacks
            if type(callback).__name__ == name and not isinstance(callback, TrainerControl)
        ]
        for callback, state in zip(mine, states if isinstance(states, list) else [states], strict=False):
            wanted = dict(state.get("attributes", {}))
            if trainer.args.restore_callback_states_from_checkpoint:
                # What a callback was made with is kept under the same names by those that can be made again.
                wanted |= {key: value for key, value in state.get("args", {}).items() if hasattr(callback, key)}
            for attribute, value in wanted.items():
                setattr(callback, attribute, value)


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """Write a learning-rate scheduler's state."""
    save_tree(folder, "scheduler", scheduler.state_dict())


def load_scheduler(scheduler: Any, folder: Path) -> None:
    """Read a learning-rate scheduler's state."""
    scheduler.load_state_dict(load_tree(folder, "scheduler"))


def load_scaler(scaler: Any, folder: Path) -> None:
    """Read a loss scaler's state where the run that saved it had one."""
    if scaler is not None and has_tree(folder, "scaler"):
        scaler.load_state_dict(load_tree(folder, "scaler"))
