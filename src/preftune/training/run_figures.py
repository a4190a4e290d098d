"""Figures of a run: what a log line says, and what an evaluation finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import nn
from transformers import TrainerState

from preftune.training.batch import Batch
from preftune.training.config import PackedConfig
from preftune.training.step import Step


def line_is_due(args: PackedConfig, state: TrainerState) -> bool:
    """Whether the present step ends with a log line, so that entropy, mean logit and top-1 are worth their time."""
    number, every = state.global_step + 1, max(int(state.logging_steps), 1)
    first = args.logging_first_step and number == 1
    return first or number % every == 0 or args.logging_strategy == "epoch"


def completed(logs: dict[str, float], step: Step, history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A log line of training with the metrics since the last one; other lines stay as they are."""
    if "loss" in logs and "eval_loss" not in logs:
        step.processes.agree_on_names(step.sums)
        logs.update(step.sums.pop(step.processes.reduce))
        logs["num_tokens"] = tokens_trained(step)
    elif "train_loss" in logs:
        # The last steps of a run, where no line of their own was due.
        step.processes.agree_on_names(step.sums)
        # In place: what train() returns is this very mapping.
        logs.update(step.sums.pop(step.processes.reduce))
        tokens = tokens_trained(step)
        if all(line.get("num_tokens") != tokens for line in history):
            logs["num_tokens"] = tokens
    return logs


def tokens_trained(step: Step) -> float:
    """Tokens that all processes have trained on."""
    return step.processes.sums([float(step.num_tokens)])[0]


def evaluate(
    step: Step, model: nn.Module, batches: Iterable[Batch], after_batch: Callable[[], None], *, predict: bool
) -> tuple[dict[str, float], Any]:
    """Metrics over all batches and processes, and predictions in the order of the data, or ``None``.

    Args:
        step: Runs the rows.
        model: The policy.
        batches: This process's share, to be gone through more than once.
        after_batch: Called after every batch.
        predict: Whether predictions are wanted.
    """
    predictions = []
    whole = step.task.begin_evaluation(batches, step)
    for batch in step.processes.together(batches):
        found = step.evaluate(model, batch, whole or step.task.totals(batch.examples))
        if found is not None and predict:
            predictions.append(found)
        after_batch()
    step.processes.agree_on_names(step.held_out)
    metrics = {**step.held_out.pop(step.processes.reduce), "num_tokens": tokens_trained(step)}
    if not predict:
        return metrics, None
    # One process goes through the data in their order; trials that share a forward give several predictions an example.
    sampler = getattr(batches, "batch_sampler", None) if step.processes.number > 1 else None
    places = list(range(sum(map(len, predictions)))) if sampler is None else list(chain.from_iterable(sampler))
    return metrics, step.processes.in_order(predictions, places)
