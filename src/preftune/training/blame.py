"""Which rows of the training data a loss or gradient that is not finite comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from preftune.training.batch import Batch, Example
from preftune.training.checkpoints import rng
from preftune.training.step import Step

_MOST_NAMED = 8
_NUM_TOKENS = 8


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
