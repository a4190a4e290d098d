"""Losses that need all pairs of an optimizer step at once, such as those that sort log-ratios across the batch.

Two passes: the first scores all rows without graph and takes the loss's gradient with respect to the per-sequence sums;
the second scores the rows again, one at a time, and carries that gradient through the model. The result does not
depend on the token budget, the accumulation or the number of processes, and memory stays that of one row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from preftune.objectives import PairLogps
from preftune.packing import PackedRow
from preftune.training import memory
from preftune.training.batch import Batch

if TYPE_CHECKING:
    from preftune.training.dpo import DPOTrainer

_INPUTS = ("chosen_logps", "rejected_logps", "chosen_sum_logps")


def run_jointly(
    trainer: DPOTrainer, model: nn.Module, rows: list[PackedRow], batch: Batch, totals: list[float]
) -> Tensor:
    """Forward and backward of an optimizer step whose loss joins all of its pairs. Returns the loss, detached."""
    with torch.no_grad(), trainer.accelerator.autocast(), trainer.forward_policy.active():
        scored = [trainer.score_row(model, row, batch, totals, with_stats=True) for row in rows]
    # Rows that repeat an earlier one stand at the end; they only keep sharded processes in step and weigh nothing.
    real = len({id(row) for row in rows})
    mine = PairLogps.concat([each[1] for each in scored[:real]])
    everyone, start = _gathered(trainer, mine)
    leaves = {name: getattr(everyone, name).detach().requires_grad_(True) for name in _INPUTS}
    with torch.enable_grad():
        result = trainer.losses(replace(everyone, **leaves))
        loss = result.loss.sum() / totals[0]
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    local = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    for row, (scores, logps) in zip(rows[:real], scored, strict=False):
        trainer.note_row(row, scores, logps, None)
    _second_pass(trainer, model, rows, real, batch, totals, local, start)
    # Every process holds the whole loss here; their shares have to add up to it.
    share: Tensor = loss.detach().to(torch.float32) / trainer.args.world_size
    return share


def _second_pass(
    trainer: DPOTrainer,
    model: nn.Module,
    rows: list[PackedRow],
    real: int,
    batch: Batch,
    totals: list[float],
    grads: dict[str, Tensor],
    start: int,
) -> None:
    stop = start
    with (
        trainer.accelerator.autocast(),
        trainer.forward_policy.active(),
        memory.offloading(trainer.args.activation_offloading, trainer.model),
    ):
        for number, row in enumerate(rows):
            logps = trainer.score_row(model, row, batch, totals, with_stats=False)[1]
            if number < real:
                start, stop = stop, stop + logps.num_pairs
            surrogate = sum((grads[name][start:stop] * getattr(logps, name)).sum() for name in _INPUTS)
            assert isinstance(surrogate, Tensor)
            trainer.backward_row(model, surrogate if number < real else surrogate * 0, last=number == len(rows) - 1)


def _gathered(trainer: DPOTrainer, mine: PairLogps) -> tuple[PairLogps, int]:
    """The pairs of all processes in rank order, and where this process's begin."""
    if trainer.args.world_size == 1:
        return mine, 0
    from accelerate.utils import gather_object

    columns = {name: value.detach().cpu() for name, value in vars(mine).items() if isinstance(value, Tensor)}
    parts = [PairLogps(**{k: v.to(trainer.args.device) for k, v in part.items()}) for part in gather_object([columns])]
    before = sum(part.num_pairs for part in parts[: trainer.args.process_index])
    return PairLogps.concat(parts), before
