"""Steps whose loss or gradient is not finite: they are skipped, and the rows that cause them are named.

Weights, optimizer and schedule stay as they were.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from preftune.errors import TrainingError
from preftune.training.batch import Batch, Example
from preftune.training.checkpoints import rng
from preftune.training.step import Step

_MOST_NAMED = 8
_NUM_TOKENS = 8


def is_finite(step: Step, norm: Any) -> bool:
    """Whether a step's gradient norm and loss are numbers, in every process.

    Args:
        step: The step.
        norm: Norm of its gradient, the same everywhere; losses are not.
    """
    full = getattr(norm, "full_tensor", None)
    value = full() if full is not None else torch.as_tensor(norm, device=step.device)
    if step.loss is not None:
        value = value.to(torch.float32) + step.loss.to(torch.float32) * 0
    return step.processes.all_well(bool(torch.isfinite(value).all()))


def skip_step(step: Step, model: nn.Module) -> None:
    """Leave weights, optimizer and schedule as they are, and everything else as it was before the step."""
    step.undo()
    for parameter in model.parameters():
        parameter.grad = None
    # accelerate's optimizer does nothing between synchronisations, and a skipped step leaves the schedule alone.
    step.accelerator.gradient_state._set_sync_gradients(False)
    for optimizer in step.accelerator._optimizers:
        optimizer._is_overflow = True


def forget_skip(accelerator: Accelerator) -> None:
    """Let the next step count again."""
    if accelerator.scaler is None:
        for optimizer in accelerator._optimizers:
            optimizer._is_overflow = False


def say_skipped(step: Step, rows: str, in_a_row: int) -> None:
    """Say that a step was skipped.

    Args:
        step: The step.
        rows: Which rows its values come from, in words.
        in_a_row: Steps skipped one after the other, this one included.

    Raises:
        TrainingError: They are more than ``max_skipped_steps``.
    """
    finite_loss = step.loss is None or bool(torch.isfinite(step.loss))
    what = f"step {step.number}: the {'gradient' if finite_loss else 'loss'} is not finite"
    if in_a_row > step.args.max_skipped_steps:
        raise TrainingError(
            f"{what}, in {in_a_row} steps in a row; {rows}",
            remedy="look at these rows; lower learning_rate, set max_grad_norm, or train in bf16 or fp32",
        )
    warnings.warn(
        f"{what}; the step is skipped, weights and optimizer stay as they were; {rows}", UserWarning, stacklevel=3
    )


def blamed_rows(step: Step, model: nn.Module, dataset: Any, tokenizer: Any) -> str:
    """Name the examples of a step that alone give a loss or gradient that is not finite.

    Every example is run by itself once more. With several processes, whose steps have to be taken together, all
    examples of this process are named instead.

    Args:
        step: The step.
        model: The wrapped model.
        dataset: Prepared training data.
        tokenizer: Shows how an example begins.
    """
    if not all(bool(torch.isfinite(p.detach()).all()) for p in step.forward.model.parameters()):
        return "the weights themselves are not finite"
    together = step.processes.number > 1
    guilty = step.batch.examples
    if not together:
        guilty = [example for example in guilty if not _is_finite_alone(step, model, example)]
    if not guilty:
        return "no row by itself, but all of the step together"
    shown = ", ".join(_describe_row(dataset, tokenizer, example) for example in guilty[:_MOST_NAMED])
    more = len(guilty) - _MOST_NAMED
    among = "among " if together else ""
    return f"{among}rows of the prepared training data: {shown}" + (f" and {more} more" if more > 0 else "")


def _is_finite_alone(step: Step, model: nn.Module, example: Example) -> bool:
    state = rng.capture(step.device)
    model.zero_grad(set_to_none=True)
    try:
        alone = Batch([example], [1])
        rows = step.plan(alone)
        step.task.before_rows(rows, alone, step, training=True)
        loss = step.run_rows(model, rows, alone, step.task.totals(alone.examples))
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return bool(torch.isfinite(loss)) and all(bool(torch.isfinite(grad).all()) for grad in grads)
    finally:
        model.zero_grad(set_to_none=True)
        rng.restore(state, step.device)


def _describe_row(dataset: Any, tokenizer: Any, example: Example) -> str:
    """Number of an example in the prepared training data, and how it begins."""
    number = find_row(dataset, example)
    columns = [name for name in example if name.endswith("_ids") and example[name] is not None]
    tokens = np.concatenate([np.asarray(example[name]) for name in columns])[:_NUM_TOKENS]
    return f"{'?' if number is None else number} ({tokenizer.decode(tokens.tolist())!r})"


def find_row(dataset: Any, example: Example) -> int | None:
    """Number of the row with an example's token columns, the first where several are the same."""
    names = [name for name in example if name.endswith("_ids") and example[name] is not None]
    if not hasattr(dataset, "with_format") or not names:
        return None
    import pyarrow.compute as pc

    reader = dataset.select_columns(names).with_format("arrow")
    block = 4096
    for start in range(0, len(dataset), block):
        table = reader[start : start + block]
        candidates = np.ones(len(table), dtype=bool)
        for name in names:
            lengths = pc.fill_null(pc.list_value_length(table[name]), -1).to_numpy()
            candidates &= lengths == len(example[name])
        for place in np.flatnonzero(candidates):
            if all(np.array_equal(table[name][int(place)].as_py(), example[name]) for name in names):
                return int(start + place)
    return None
