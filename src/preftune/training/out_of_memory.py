"""Memory that runs out in a row of a training step: how much shorter rows become."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from preftune.errors import SetupError
from preftune.packing import PackedRow


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
