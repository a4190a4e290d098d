"""One optimizer step: its rows, their forward and backward, and what happens where memory runs out.

Rows are a matter of arrangement: the loss is a sum over examples, so a step whose row does not fit is run again in
shorter rows, from an empty gradient, and ends with the same one.

A loss that joins all examples of a step, such as one that sorts log-ratios across it, takes two passes: the first
scores all rows without graph and takes the loss's gradient with respect to the per-sequence sums; the second scores the
rows again, one at a time, and carries that gradient through the model. The result does not depend on the token budget,
the accumulation or the number of processes, and memory stays that of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from preftune.kernels.device import put, wide_dtype
from preftune.kernels.head import TokenScores
from preftune.models.forward import RowForward
from preftune.models.gate import Verdict
from preftune.models.head import base_model
from preftune.objectives import PairLogps
from preftune.packing import PackedRow, build_row
from preftune.references.memory import ran_out_of_memory
from preftune.training import memory
from preftune.training.batch import Batch, Examples
from preftune.training.checkpoints import rng
from preftune.training.config import PackedConfig
from preftune.training.guards.evidence import Watch
from preftune.training.metrics import MetricSums
from preftune.training.noise import EmbeddingNoise
from preftune.training.out_of_memory import shorter_budget
from preftune.training.processes import Processes
from preftune.training.router import RouterLoss
from preftune.training.task import RowTerms, Task, Trees
from preftune.training.tasks.pairs import PairTask

#: Per-sequence sums that a joint loss has a gradient for.
_INPUTS = ("chosen_logps", "rejected_logps", "chosen_sum_logps")


class Step:
    """Runs the optimizer steps of a task, and the batches of its evaluations.

    Args:
        task: What is trained.
        forward: The policy's forward.
        accelerator: Accelerate's, for mixed precision and the backward.
        args: Settings.
        processes: All that train together.

    Attributes:
        terms_of: Gives a row's loss and metrics: the task's method, unless a trainer has its own.
        verdict: Whether rows are packed, and why not.
        bytes_per_token: Memory that a token of a row takes between forward and backward.
        router: The load-balancing loss, or ``None``.
        noise: NEFTune, or ``None``.
        watch: What guards are shown.
        sums: Metrics since the last log line.
        held_out: Metrics of the evaluation that is going on.
        num_tokens: Tokens trained on by this process.
        max_tokens_per_row: Token budget of a row.
        checkpoint_above: Longest row that is run without recomputing activations.
        with_stats: Whether the present step's log line is due, so that entropy, mean logit and top-1 are worth their
            time.
        batch: Examples of the present step.
        number: Its number, from one.
        loss: Its loss, or ``None`` before the first.
    """

    verdict: Verdict
    bytes_per_token: float

    def __init__(
        self,
        task: Task,
        forward: RowForward,
        accelerator: Accelerator,
        args: PackedConfig,
        processes: Processes,
    ) -> None:
        self.task = task
        self.forward = forward
        self.accelerator = accelerator
        self.args = args
        self.processes = processes
        self.router: RouterLoss | None = None
        self.noise: EmbeddingNoise | None = None
        self.watch = Watch(args.device, on=False)
        self.sums = MetricSums(args.device, task.derived)
        self.held_out = MetricSums(args.device, task.derived)
        self.num_tokens = torch.zeros((), dtype=wide_dtype(args.device), device=args.device)
        self.max_tokens_per_row = self.checkpoint_above = 1 << 62
        self.with_stats = False
        self.batch, self.number = Batch(), 0
        self.loss: Tensor | None = None
        self.terms_of: Callable[..., RowTerms] = task.row_terms
        self._num_parameters: int | None = None
        self._num_groups = 0.0
        self._kept: tuple[dict[str, Any], Any] = ({}, None)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def take(self, model: nn.Module, batch: Batch, number: int) -> Tensor:
        """Forward and backward of all rows of an optimizer step, in shorter rows where memory runs out.

        Args:
            model: The wrapped model.
            batch: The examples of the step.
            number: Number of the step, from one.

        Returns:
            This process's share of the loss, detached.

        Raises:
            SetupError: Memory ran out, and rows cannot be made shorter, or not by this process alone.
        """
        totals = self.processes.sums(self.task.totals(batch.examples))
        self.batch, self.number, self._kept = batch, number, (self.state(), self.task.kept())
        self._num_groups = self.processes.sums([float(len(batch.groups()))])[0] if self.router else 0.0
        batch = self.processes.filled(batch)
        state = rng.capture(self.args.device)
        while True:
            rows: list[PackedRow] = []
            try:
                rows = self.plan(batch)
                rows += [rows[-1]] * (self.processes.most_rows(len(rows)) - len(rows))
                self.task.before_rows(rows, batch, self, training=True)
                self.loss = loss = self.run_rows(model, rows, batch, totals)
                break
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                alone = not (self.processes.number > 1 or self.processes.sharded)
                self.max_tokens_per_row = shorter_budget(
                    rows, self.max_tokens_per_row, error, number, alone=alone, divisible=self.router is None
                )
            # Out of the handler, whose traceback holds the activations: part of the gradient may have been added.
            model.zero_grad(set_to_none=True)
            clear_device_cache(garbage_collection=True)
            self.undo()
            rng.restore(state, self.args.device)
        self.num_tokens += float(self.task.num_tokens(self.batch.examples))
        reduce = self.processes.reduce
        self.task.finish_step((lambda own: reduce(torch.zeros_like(own))) if batch.weightless else reduce)
        return loss

    def undo(self) -> None:
        """Let everything but weights and random state be as it was before the present step."""
        self.load_state(self._kept[0])
        self.task.undo(self._kept[1])

    def state(self) -> dict[str, Any]:
        """Sums since the last log line, for a checkpoint."""
        return {"metrics": self.sums.state(), "num_tokens": self.num_tokens.clone(), "watch": self.watch.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with the sums of :meth:`state`."""
        self.sums.load_state(state["metrics"])
        # A copy: what is kept of a step may be needed again.
        self.num_tokens = state["num_tokens"].to(self.args.device, wide_dtype(self.args.device), copy=True)
        self.watch.load_state(state["watch"])

    # ---- rows -------------------------------------------------------------------------------------------------------

    def plan(self, batch: Batch) -> list[PackedRow]:
        """Rows of a batch, under the token budget."""
        lengths = self._lengths(batch.examples, self.task.trees)
        groups = batch.groups() if self.router else self.forward.rows_of(lengths, self.max_tokens_per_row)
        return [self._row(batch.examples, numbers, self.task.trees) for numbers in groups]

    def _lengths(self, examples: Examples, trees: Trees) -> list[int]:
        return [sum(tree.num_tokens for tree in trees(example, 0)) for example in examples]

    def _row(self, examples: Examples, numbers: Sequence[int], trees: Trees) -> PackedRow:
        return build_row([tree for k, n in enumerate(numbers) for tree in trees(examples[n], k)], numbers)

    def lengths_of(self, examples: Examples) -> list[int]:
        """Tokens that each example takes in a row."""
        return self._lengths(examples, self.task.trees)

    def flops(self, batch: Batch) -> int:
        """Floating-point operations of a batch: six per parameter and computed token."""
        if self._num_parameters is None:
            self._num_parameters = base_model(self.forward.model).num_parameters(exclude_embeddings=True)
        return int(6 * sum(self._lengths(batch.examples, self.task.trees)) * self._num_parameters)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The region that forward and backward of rows run in.

        One autocast region around all rows keeps the half-precision copies of the weights for the whole step.
        """
        with self.accelerator.autocast(), self.forward.active():
            yield

    def run_rows(self, model: nn.Module, rows: list[PackedRow], batch: Batch, totals: list[float]) -> Tensor:
        """Forward and backward row by row. Returns this process's share of the loss, detached."""
        if self.task.joint:
            return self._run_jointly(model, rows, batch, totals)
        loss = torch.zeros((), device=self.args.device)
        # Rows that repeat an earlier one, or stand in where there is none, keep processes in step and weigh nothing.
        real = set() if batch.weightless else {id(row) for row in rows}
        with self.computing(), memory.offloading(self.args.activation_offloading, self.forward.model):
            for number, row in enumerate(rows):
                padding = id(row) not in real
                real.discard(id(row))
                with self._exchanging(model, last=number == len(rows) - 1):
                    terms = self.row_terms(model, row, batch, totals, self.with_stats and not padding)
                    share = terms.total / max(totals[self.task.denominator], 1.0)
                    if terms.router is not None and self.router is not None:
                        share = share + self.router.coef * terms.router / max(self._num_groups, 1.0)
                    self.backward(share * 0 if padding else share)
                if not padding:
                    self.sums.add(terms.metrics)
                    self.watch.add_train(terms.pairs)
                    loss += share.detach()
        return loss

    def row_terms(self, model: nn.Module, row: PackedRow, batch: Batch, totals: list[float], stats: bool) -> RowTerms:
        """Score a row, and take its loss and metrics."""
        scores, output = self.score(model, row, stats)
        terms = self.terms_of(row, scores, [batch.examples[n] for n in row.examples], totals)
        if self.router is not None:
            terms.router = self.router.term(output)
            terms.metrics["aux_loss"] = (terms.router.detach(), 1.0)
        return terms

    def score(self, model: nn.Module, row: PackedRow, with_stats: bool) -> tuple[TokenScores, Any]:
        """Score a row under the policy, recomputing activations later where they would not fit."""
        recompute = bool(self.args.gradient_checkpointing) and row.num_tokens > self.checkpoint_above
        noise: AbstractContextManager[None] = nullcontext()
        if self.noise is not None and self.forward.model.training:
            noise = self.noise.on(row, packed=self.forward.packed)
        with memory.checkpointing(self.forward.model, recompute), noise:
            return self.forward(
                row,
                wrapped=model,
                with_stats=with_stats,
                with_log_sum_sq=self.task.needs_log_sum_sq,
                extra=self.router.keywords if self.router else None,
            )

    @contextmanager
    def _exchanging(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """The region of a row's forward and backward; processes exchange gradients once, with the last row.

        DDP decides in the forward whether the backward exchanges anything.
        """
        self.accelerator.gradient_state._set_sync_gradients(last)
        with nullcontext() if last or self.processes.number == 1 else self.accelerator.no_sync(model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add a row's gradient."""
        # Wrappers average gradients over processes, and DeepSpeed over an accumulation, while the loss is already
        # divided by the global count.
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        own = {"scale_wrt_gas": False} if deepspeed else {}
        self.accelerator.backward(loss * self.processes.number, **own)

    # ---- what a task may ask for before its rows --------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = self.args.device
        return device

    def sum_over_processes(self, values: list[float]) -> list[float]:
        """Each value summed over all processes."""
        return self.processes.sums(values)

    def scored(self, batches: Iterable[Batch], trees: Trees) -> Iterator[tuple[PackedRow, Examples, Tensor, bool]]:
        """Rows of some trees of batches, their examples, log-probs without graph, and whether the row counts."""
        # Without a graph a row costs a fraction of a training row's memory.
        budget = memory.reference_budget(self.max_tokens_per_row, self.args.device)
        for batch in self.processes.together(batches):
            if self.processes.sharded:
                batch = self.processes.filled(batch)
            numbered = self.forward.rows_of(self._lengths(batch.examples, trees), budget)
            real = 0 if batch.weightless else len(numbered)
            numbered += [numbered[-1]] * (self.processes.most_rows(len(numbered)) - len(numbered))
            for place, numbers in enumerate(numbered):
                row = self._row(batch.examples, numbers, trees)
                with torch.no_grad(), self.computing():
                    logps = self.forward(row)[0].logps
                yield row, [batch.examples[n] for n in numbers], logps, place < real

    # ---- losses that join the examples of a step --------------------------------------------------------------------

    def _run_jointly(self, model: nn.Module, rows: list[PackedRow], batch: Batch, totals: list[float]) -> Tensor:
        task = self.task
        assert isinstance(task, PairTask)
        examples = [[batch.examples[n] for n in row.examples] for row in rows]
        with torch.no_grad(), self.computing():
            scored = [self.score(model, row, with_stats=True)[0] for row in rows]
            pairs = [task.pair_logps(*each, totals) for each in zip(rows, scored, examples, strict=True)]
        # Rows that repeat an earlier one stand at the end; they only keep processes in step and weigh nothing.
        real = 0 if batch.weightless else len({id(row) for row in rows})
        everyone, start = self._of_all_processes(PairLogps.concat(pairs[:real]) if real else None)
        leaves = {name: getattr(everyone, name).detach().requires_grad_(True) for name in _INPUTS}
        with torch.enable_grad():
            loss = task.losses(replace(everyone, **leaves)).loss.sum() / totals[0]
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for row, scores, logps in zip(rows[:real], scored, pairs, strict=False):
            terms = task.terms(row, scores, logps, None)
            self.sums.add(terms.metrics)
            self.watch.add_train(terms.pairs)
        with self.computing(), memory.offloading(self.args.activation_offloading, self.forward.model):
            for number, row in enumerate(rows):
                with self._exchanging(model, last=number == len(rows) - 1):
                    scores = self.score(model, row, with_stats=False)[0]
                    logps = task.pair_logps(row, scores, examples[number], totals)
                    # A repeated row takes part in the exchange alone.
                    own = slice(start, start + logps.num_pairs) if number < real else slice(0, logps.num_pairs)
                    start += logps.num_pairs if number < real else 0
                    surrogate = sum(
                        (grad[own] * getattr(logps, name)).sum()
                        for name, grad in zip(_INPUTS, grads, strict=True)
                        if grad is not None
                    )
                    assert isinstance(surrogate, Tensor)
                    self.backward(surrogate if number < real else surrogate * 0)
        # Every process holds the whole loss here; their shares have to add up to it.
        share: Tensor = loss.detach().to(torch.float32) / self.processes.number
        return share

    def _of_all_processes(self, mine: PairLogps | None) -> tuple[PairLogps, int]:
        """The pairs of all processes in rank order, and where this process's begin."""
        if mine is not None and self.processes.number == 1:
            return mine, 0
        kept = {} if mine is None else vars(mine)
        columns = {name: value.detach().cpu() for name, value in kept.items() if isinstance(value, Tensor)}
        parts = [
            PairLogps(**{k: v.to(self.args.device) for k, v in part.items()}) if part else None
            for part in self.processes.gathered(columns)
        ]
        before = sum(part.num_pairs for part in parts[: self.processes.index] if part is not None)
        return PairLogps.concat([part for part in parts if part is not None]), before

    # ---- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch, totals: list[float]) -> Tensor | None:
        """Add up a batch's metrics. Returns its predictions in the order of the examples."""
        if self.processes.sharded:
            batch = self.processes.filled(batch)
        rows = self.plan(batch)
        real = 0 if batch.weightless else len(rows)
        rows += [rows[-1]] * (self.processes.most_rows(len(rows)) - len(rows))
        self.task.before_rows(rows, batch, self, training=False)
        found: list[Tensor] = []
        watched: list[Tensor | None] = []
        with self.computing():
            for place, row in enumerate(rows):
                terms = self.row_terms(model, row, batch, totals, stats=True)
                if place >= real:
                    continue
                balance = 0.0 if self.router is None else self.router.coef * terms.metrics["aux_loss"][0]
                self.held_out.add({**terms.metrics, "loss": (terms.total + balance * terms.weight, terms.weight)})
                watched.append(terms.pairs)
                if terms.predictions is not None:
                    found.append(terms.predictions)
        order = [n for row in rows[:real] for n in row.examples]
        self.watch.add_heldout(watched, order, batch.examples)
        if not found:
            return None
        return torch.cat(found)[put(np.argsort(order), found[0].device)]

    def mean_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, with graph."""
        totals = self.task.totals(batch.examples)
        rows = self.plan(batch)
        self.task.before_rows(rows, batch, self, training=True)
        with self.computing():
            losses = [self.row_terms(model, row, batch, totals, False).total for row in rows]
        return torch.stack(losses).sum() / max(totals[self.task.denominator], 1.0)
