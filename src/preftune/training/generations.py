"""Periodic samples of the policy during training: KL to the reference, lengths, and texts to read.

KL on the policy's own samples, KL = E_{y ~ pi}[log pi(y|x) - log pi_ref(y|x)], is what over-optimisation is measured
against (2406.02900); the log-ratios of the training data are no estimate of it. One completion is drawn for each of a
fixed set of prompts, with the same random numbers every time, so that what changes between two steps is the policy.
Training does not notice: the samples have random streams of their own, and nothing that trains is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftune.errors import ConfigError, DataError
from preftune.models.head import base_model
from preftune.models.sampling import TAIL_LEVEL, Sample, continue_prompts
from preftune.packing import Branch, PackedRow, Tree, build_row, share_out
from preftune.stats.clusters import Z95, t_interval
from preftune.training.batch import Example, as_arrays
from preftune.training.guards.alarm import up_to_step, write_lines
from preftune.training.guards.evidence import Generation
from preftune.training.guards.panel import find_guards
from preftune.training.reference import Reference
from preftune.training.run import Run

#: Beside the checkpoints.
SAMPLES = "samples.jsonl"
#: Completions drawn at once.
_BATCH = 64


class Generations(TrainerCallback):
    """Draws completions before the first step, every ``generation_steps`` steps and after the last one.

    Args:
        run: Whose policy is sampled.
        log: Takes a log line.

    Raises:
        ConfigError: The longest prompt fills the model's positions.
        DataError: No prompt has a token.
    """

    def __init__(self, run: Run, log: Callable[[dict[str, float]], None]) -> None:
        self._run, self._log = run, log
        self._reference: Reference | None = None
        self._examples = _choose(_dataset(run), run.args.num_generations, run.args.seed)
        self._prompts = [example["prompt_ids"].tolist() for example in self._examples]
        self._max_new_tokens = _room(run, max(map(len, self._prompts)))
        self._first: list[str | None] | None = None
        self._records: list[dict[str, Any]] = []

    def keep_reference(self) -> None:
        """Remember the policy before it moves, where nothing else keeps what samples are compared with."""
        reference = self._run.task.reference
        if reference is not None and not reference.policy_moved:
            reference.keep_shadow()
        elif reference is None and self._reference is None:
            # Methods without a reference: the policy as it was in the beginning.
            step = self._run.step
            self._reference = Reference(step.forward, step.accelerator.autocast, store=None)
            self._reference.keep_shadow()

    # ---- callback -------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sample where the run starts; a resumed one takes its first samples from its file."""
        self._records = up_to_step(self._file, state.global_step) if state.global_step else []
        first = [record for record in self._records if record["step"] == 0]
        self._first = [record["reference_completion"] for record in first] if self._fits(first) else None
        if not state.global_step:
            self._draw_and_tell(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sample where it is due, and after the last step."""
        if state.global_step % self._run.args.generation_steps == 0 or state.global_step >= state.max_steps:
            self._draw_and_tell(state, control)

    @property
    def _file(self) -> Path:
        return Path(str(self._run.args.output_dir)) / SAMPLES

    def _fits(self, records: list[dict[str, Any]]) -> bool:
        return [record["prompt"] for record in records] == [self._text(ids) for ids in self._prompts]

    def _text(self, ids: Any) -> str:
        return str(self._run.processing_class.decode(ids, skip_special_tokens=False))

    def _draw_and_tell(self, state: TrainerState, control: TrainerControl) -> None:
        run = self._run
        # All processes come to the same decisions, so all of them see the samples.
        found = self._sample(state)
        logs = figures(found)
        guards = find_guards(run)
        if guards is not None and guards.active:
            logs.update(guards.observe(found, writes=run.is_world_process_zero()))
        # Logging says that no line is due any more; the trainer's own line may still be.
        due = control.should_log
        self._log(logs)
        control.should_log = due

    # ---- sampling -------------------------------------------------------------------------------------------------

    def _sample(self, state: TrainerState) -> Generation:
        samples = self._draw(self._run.step.forward.model)
        policy, reference, tails = self._scores(samples)
        if self._first is None and state.global_step == 0:
            self._first = self._reference_texts(samples)
        first = self._first or [None] * len(samples)
        for sample, other, logp, ref_logp, tail in zip(samples, first, policy, reference, tails, strict=True):
            self._records.append(
                {
                    "step": state.global_step,
                    "prompt": self._text(sample.prompt_ids),
                    "completion": sample.text,
                    "reference_completion": other,
                    "num_tokens": len(sample.token_ids),
                    "logp": logp,
                    "ref_logp": ref_logp,
                    "tail_share": tail,
                }
            )
        if self._run.is_world_process_zero():
            write_lines(self._file, self._records)
        lengths = np.array([len(sample.token_ids) for sample in samples], dtype=np.float64)
        return Generation(
            step=state.global_step,
            epoch=float(state.epoch or 0.0),
            log_ratios=np.array(policy) - np.array(reference),
            lengths=lengths,
            chosen_lengths=np.array([_chosen_length(example) for example in self._examples]),
            entropy=-np.array(policy) / lengths,
            finished=np.array([sample.finished for sample in samples]),
            tail_shares=np.array(tails),
        )

    def _draw(self, model: Any) -> list[Sample]:
        """A sample for each prompt; processes divide the prompts, and each gets all samples."""
        step = self._run.step
        mine = list(range(len(self._prompts)))[step.processes.index :: step.processes.number]
        with step.accelerator.autocast(), step.processes.forwards_in_step(model):
            drawn = continue_prompts(
                model,
                self._run.processing_class,
                [self._prompts[number] for number in mine],
                max_new_tokens=self._max_new_tokens,
                seed=self._run.args.seed,
                batch_size=_BATCH,
                streams=mine,
            )
        found = step.processes.merged(dict(zip(mine, drawn, strict=True)))
        return [found[number] for number in range(len(found))]

    def _reference_texts(self, samples: list[Sample]) -> list[str | None]:
        reference = self._run.task.reference
        if reference is None or reference.separate is None:
            # The policy has not moved yet: it is the reference.
            return [sample.text for sample in samples]
        return [sample.text for sample in self._draw(reference.separate.model)]

    def _scores(self, samples: list[Sample]) -> tuple[list[float], list[float], list[float]]:
        """Log-prob of each sample under policy and reference, and the share of its tokens in the reference's far tail.

        Both models run through the same forward as in training. Processes divide the samples.
        """
        step = self._run.step
        trees = [Tree(np.array(sample.prompt_ids), (Branch(np.array(sample.token_ids), 0),)) for sample in samples]
        shares = share_out([tree.num_tokens for tree in trees], step.processes.number)
        mine = shares[step.processes.index]
        lengths = [trees[number].num_tokens for number in mine]
        planned = step.forward.rows_of(lengths, step.max_tokens_per_row) if mine else []
        rows = [[mine[n] for n in each] for each in planned]
        found: dict[int, tuple[float, float, float]] = {}
        for place in range(step.processes.most_rows(len(rows))):
            # One that has no row more runs along: sharded parameters are gathered from all processes.
            numbers = rows[place] if place < len(rows) else [0]
            scored = self._scored(build_row([_in_slot(trees[n], k) for k, n in enumerate(numbers)], numbers))
            if place < len(rows):
                found |= zip(numbers, scored, strict=True)
        merged = step.processes.merged(found)
        policy, other, tails = zip(*(merged[number] for number in range(len(samples))), strict=True)
        return list(policy), list(other), list(tails)

    def _scored(self, row: PackedRow) -> Iterator[tuple[float, float, float]]:
        """Log-prob under policy and reference, and share in the tail, of every sample of a row."""
        policy = _sums(row, self._policy_logps(row))
        other = tails = np.full(len(policy), np.nan)
        reference = self._run.task.reference or self._reference
        if reference is not None:
            scores = reference.row_scores(row, with_tail=True)
            assert scores.tail is not None
            other = _sums(row, scores.logps)
            tails = _sums(row, scores.tail <= TAIL_LEVEL) / np.bincount(row.target_slot)
        return zip(policy.tolist(), other.tolist(), tails.tolist(), strict=True)

    def _policy_logps(self, row: PackedRow) -> torch.Tensor:
        step, forward = self._run.step, self._run.step.forward
        training = forward.model.training
        forward.model.eval()
        try:
            with torch.no_grad(), step.computing():
                return forward(row)[0].logps
        finally:
            forward.model.train(training)


def figures(generation: Generation) -> dict[str, float]:
    """What a log line says of the samples; intervals are 95 %, Student's, over prompts."""
    kl, length = t_interval(generation.log_ratios), t_interval(generation.lengths)
    tail = t_interval(generation.tail_shares)
    return {
        "generation/kl": kl.mean,
        "generation/kl_low": kl.low(Z95),
        "generation/kl_high": kl.high(Z95),
        "generation/length": length.mean,
        "generation/length_low": length.low(Z95),
        "generation/length_high": length.high(Z95),
        "generation/tail_share": tail.mean,
        "generation/tail_share_low": tail.low(Z95),
        "generation/tail_share_high": tail.high(Z95),
        "generation/entropy": float(generation.entropy.mean()),
        "generation/finished": float(generation.finished.mean()),
    }


def _dataset(run: Run) -> Any:
    """Held-out data if there are any: the first set of several."""
    held = run.eval_dataset
    if isinstance(held, dict):
        held = next(iter(held.values()), None)
    return held if isinstance(held, datasets.Dataset) and len(held) else run.train_dataset


def _choose(dataset: Any, num: int, seed: int) -> list[Example]:
    """Examples with different prompts of at least one token, in an order that the seed decides."""
    rows: Iterable[Any]
    if isinstance(dataset, datasets.Dataset):
        order = np.random.default_rng([seed, len(dataset)]).permutation(len(dataset)).tolist()
        rows = (dataset[number] for number in order)
    else:
        # Of a stream that begins again: its beginning.
        rows = islice(dataset, 100 * num)
    found: dict[bytes, Example] = {}
    for row in rows:
        example = as_arrays(row)
        if len(example["prompt_ids"]):
            found.setdefault(example["prompt_ids"].tobytes(), example)
        if len(found) == num:
            break
    if len(found) < 2:
        raise DataError(
            "fewer than two different prompts to sample from", where="generation_steps", remedy="leave it out"
        )
    return list(found.values())


def _room(run: Run, longest: int) -> int:
    config = base_model(run.model).config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    wanted: int = run.args.generation_max_new_tokens
    if most is None:
        return wanted
    if most - longest < 1:
        raise ConfigError(
            "the longest prompt fills the model's positions", where="generation_steps", remedy="lower max_length"
        )
    return min(wanted, int(most) - longest)


def _chosen_length(example: Example) -> float:
    undesirable = example.get("label") is not None and not example["label"] > 0
    return float("nan") if undesirable else float(len(example["chosen_ids"]))


def _in_slot(tree: Tree, slot: int) -> Tree:
    (branch,) = tree.branches
    return Tree(tree.prefix, (Branch(branch.ids, slot),))


def _sums(row: PackedRow, values: torch.Tensor) -> Any:
    weights = values.float().cpu().numpy().astype(np.float64)
    return np.bincount(row.target_slot, weights=weights, minlength=len(row.examples))
