"""What a run survives: memory that runs out in a row, and values that are not finite.

A step whose loss or gradient is not finite is skipped; weights, optimizer and schedule stay as they were, and the rows
that caused it are named.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from preftune.errors import SetupError, TrainingError
from preftune.packing import PackedRow

# ---- memory ---------------------------------------------------------------------------------------------------------


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, Exception) and bool(should_reduce_batch_size(error))


def shorter_budget(
    rows: Sequence[PackedRow], budget: int, error: BaseException, step: int, *, alone: bool, divisible: bool
) -> int:
    """Half the token budget of rows, for the rest of the run.

    Args:
        rows: The rows that did not fit.
        budget: Their token budget.
        error: What was raised.
        step: Number of the step.
        alone: Whether this process can repeat a step by itself.
        divisible: Whether rows may be made of other examples.

    Raises:
        SetupError: If rows cannot be made shorter, or not by this process alone.
    """
    longest = max((row for row in rows if len(row.examples) > 1), key=lambda r: r.num_tokens, default=None)
    most = max((row.num_tokens for row in rows), default=0)
    refused = remedy = None
    if not alone:
        refused = "one process cannot repeat a step by itself"
        remedy = f"set max_tokens_per_row: {max(most // 2, 1)}"
    elif not divisible:
        refused = "the load-balancing loss belongs to micro-batches, which cannot be split"
        remedy = "lower per_device_train_batch_size and raise gradient_accumulation_steps"
    elif longest is None:
        refused = "every row holds one example"
        remedy = "lower max_length, or set gradient_checkpointing or use_peft"
    if refused is not None:
        raise SetupError(
            f"memory ran out in a row of {most} tokens, and {refused}", where=_flat(error), remedy=remedy
        ) from error
    assert longest is not None
    shorter = max(1, min(budget, longest.num_tokens) // 2)
    warnings.warn(
        f"memory ran out in step {step}; its rows are run again, and rows from now on hold up to {shorter} tokens "
        f"instead of {budget} (max_tokens_per_row); results stay the same",
        UserWarning,
        stacklevel=3,
    )
    return shorter


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


# ---- values that are not finite -------------------------------------------------------------------------------------


def is_finite(norm: Any, loss: Tensor | None, device: torch.device) -> bool:
    """Whether a step's gradient norm and this process's loss are numbers."""
    full = getattr(norm, "full_tensor", None)
    value = full() if full is not None else torch.as_tensor(norm, device=device)
    if loss is not None:
        value = value.to(torch.float32) + loss.to(torch.float32) * 0
    return bool(torch.isfinite(value).all())


def skip_step(model: nn.Module, accelerator: Accelerator) -> None:
    """Leave weights, optimizer and schedule as they are, at the end of a step."""
    for parameter in model.parameters():
        parameter.grad = None
    # accelerate's optimizer does nothing between synchronisations, and a skipped step leaves the schedule alone.
    accelerator.gradient_state._set_sync_gradients(False)
    for optimizer in accelerator._optimizers:
        optimizer._is_overflow = True


def forget_skip(accelerator: Accelerator) -> None:
    """Let the next step count again."""
    if accelerator.scaler is None:
        for optimizer in accelerator._optimizers:
            optimizer._is_overflow = False


def say_skipped(step: int, loss: Tensor | None, rows: str, in_a_row: int, most: int) -> None:
    """Say that a step was skipped.

    Args:
        step: Its number.
        loss: Its loss.
        rows: Which rows it comes from, in words.
        in_a_row: Steps skipped one after the other, this one included.
        most: How many are allowed.

    Raises:
        TrainingError: They are too many.
    """
    finite_loss = loss is None or bool(torch.isfinite(loss))
    what = f"step {step}: the {'gradient' if finite_loss else 'loss'} is not finite"
    if in_a_row > most:
        raise TrainingError(
            f"{what}, in {in_a_row} steps in a row; {rows}",
            remedy="look at these rows; lower learning_rate, set max_grad_norm, or train in bf16 or fp32",
        )
    warnings.warn(
        f"{what}; the step is skipped, weights and optimizer stay as they were; {rows}", UserWarning, stacklevel=3
    )
